// Partition of a call into units of work, by shape and length alone, never by the number of threads: the bits
// of a sequence depend neither on the thread that runs it nor on its neighbours in the batch.
#pragma once

#include "common/gemm.h"
#include "kvcache/kvcache.h"

namespace resformer::RESFORMER_ISA {

constexpr int64_t kMostTokens = 128;  // in a block of keys
constexpr int64_t kFewTokens = 16;    // the size of a block is a multiple of this
constexpr int64_t kUnitRows = 64;     // most rows (queries times query heads of a KV head) of a unit

// One group of rows and heads of a sequence, partitioned into `splits` units.
struct CacheGroup {
  int64_t sequence, head, heads, row, rows, splits;
  int64_t first_unit;     // units in the groups before this one
  int64_t first_partial;  // floats of partial results before this one
};

struct CacheRange {
  int64_t begin, end;  // tokens
};

class CachePlan {
 public:
  explicit CachePlan(const CacheProblem& p, int64_t element_bytes) : p_(p) {
    const int64_t rows = p.queries * p.group, token = (p.keys.dim + p.values.dim) * element_bytes;
    tile_rows_ = smaller(rows, kUnitRows);
    // All heads of a token are adjacent in memory, so a unit takes as many as fit the caches together with
    // its state and a block of a few tokens.
    const int64_t state = larger(tile_rows_, 1) * (p.keys.dim + p.values.dim) * 4;
    heads_ = larger(smaller(kStateBytes / state, kWidestBytes / (kFewTokens * token)), 1);
    if (!streams()) heads_ = 1;  // products take most of the time, and long rows of scores speed them up
    const int64_t parts = (p.heads_kv + heads_ - 1) / heads_;
    heads_ = (p.heads_kv + parts - 1) / parts;
    tokens_ =
        larger(smaller(kBlockBytes / (heads_ * token) / kFewTokens * kFewTokens, kMostTokens), kFewTokens);
    for (size_t b = 0; b < p.sequences.size(); ++b) {
      key_bytes_ += (p.sequences[b].last - p.sequences[b].first) * p.heads_kv * p.keys.dim * element_bytes;
      for (int64_t row = 0; row < rows; row += tile_rows_) {
        for (int64_t h = 0; h < p.heads_kv; h += heads_) {
          const int64_t heads = smaller(heads_, p.heads_kv - h), count = smaller(tile_rows_, rows - row);
          CacheGroup g{static_cast<int64_t>(b), h, heads, row, count, 1, units_, partial_};
          g.splits = splits(g, token);
          units_ += g.splits;
          if (g.splits > 1) partial_ += g.splits * g.heads * g.rows * partial_row();
          groups_.push_back(g);
        }
      }
    }
  }

  const std::vector<CacheGroup>& groups() const { return groups_; }
  int64_t units() const { return units_; }
  int64_t partial_floats() const { return partial_; }
  int64_t tokens() const { return tokens_; }  // per block
  int64_t most_heads() const { return heads_; }
  int64_t most_rows() const { return tile_rows_; }
  bool streams() const { return tile_rows_ <= 8; }  // few rows: see stream.h
  int64_t columns() const { return round_up(p_.values.dim, 2 * kLanes); }
  int64_t partial_row() const { return columns() + 2; }

  // Whether K is too large to stay in a cache until the next call.
  bool keys_once() const { return key_bytes_ >= kOnceBytes; }

  // Range of keys visible to any row of a group.
  int64_t first(const CacheGroup& g) const {
    const CacheSequence& s = p_.sequences[g.sequence];
    return larger(p_.key_lo(s, g.row / p_.group), s.first);
  }
  int64_t last(const CacheGroup& g) const {
    const CacheSequence& s = p_.sequences[g.sequence];
    return larger(smaller(p_.key_hi(s, (g.row + g.rows - 1) / p_.group), s.last), first(g));
  }
  // Keys of one unit of the group: whole blocks.
  CacheRange keys_of(const CacheGroup& g, int64_t split) const {
    const int64_t from = first(g), end = last(g), blocks = (end - from + tokens_ - 1) / tokens_;
    return {from + blocks * split / g.splits * tokens_,
            smaller(from + blocks * (split + 1) / g.splits * tokens_, end)};
  }
  int64_t group_of(int64_t unit) const {
    int64_t low = 0, high = static_cast<int64_t>(groups_.size());
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (groups_[middle].first_unit <= unit ? low : high) = middle;
    }
    return low;
  }

 private:
  static constexpr int64_t kStateBytes = 1 << 18, kBlockBytes = 1 << 16, kWidestBytes = 1 << 17;
  static constexpr int64_t kSplitBytes = 1 << 20, kMostSplits = 128, kOnceBytes = 1 << 22;

  // A split reads at least a megabyte, and 64 times the bytes of its partial result.
  int64_t splits(const CacheGroup& g, int64_t token) const {
    if (p_.splits > 0) return p_.splits;
    const int64_t bytes = (last(g) - first(g)) * g.heads * token;
    const int64_t partial = g.heads * g.rows * partial_row() * 4;
    return larger(smaller(bytes / larger(kSplitBytes, 64 * partial), kMostSplits), 1);
  }

  const CacheProblem& p_;
  int64_t tile_rows_ = 1, heads_ = 1, tokens_ = kFewTokens, units_ = 0, partial_ = 0, key_bytes_ = 0;
  std::vector<CacheGroup> groups_;
};

}  // namespace resformer::RESFORMER_ISA

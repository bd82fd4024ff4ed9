// Partition of a call into units of work, by shape and length alone, never by the number of threads: the bits
// of a sequence depend neither on the thread that runs it nor on its neighbours in the batch.
#pragma once

#include "common/gemm.h"
#include "kvcache/kvcache.h"

namespace resformer::RESFORMER_ISA {

constexpr int64_t kMostTokens = 128;  // in a block of keys
constexpr int64_t kFewTokens = 16;    // the size of a block is a multiple of this
constexpr int64_t kUnitRows = 64;     // most rows (queries times query heads of a KV head) of a unit

// How the sequences of one length in queries are partitioned.
struct CacheTiling {
  int64_t rows = 1, heads = 1, tokens = kFewTokens;  // most rows and heads of a unit; tokens of a block
  bool streams = false;                              // few rows: see stream.h
};

// One group of rows and heads of a sequence, partitioned into `splits` units.
struct CacheGroup {
  int64_t sequence, head, heads, row, rows, splits;
  CacheTiling tiling;
  int64_t first_unit;     // units in the groups before this one
  int64_t first_partial;  // floats of partial results before this one
};

struct CacheRange {
  int64_t begin, end;  // tokens
};

class CachePlan {
 public:
  CachePlan(const CacheProblem& p, int64_t element_bytes)
      : p_(p), token_bytes_((p.keys.dim + p.values.dim) * element_bytes) {
    int64_t queries = -1;
    CacheTiling tiling;
    for (size_t b = 0; b < p.sequences.size(); ++b) {
      const CacheSequence& s = p.sequences[b];
      if (s.queries.count != queries) {
        queries = s.queries.count;
        tiling = tiling_of(queries * p.group);
        tilings_.push_back(tiling);
      }
      add_groups(static_cast<int64_t>(b), queries * p.group, tiling);
    }
  }

  const std::vector<CacheGroup>& groups() const { return groups_; }
  int64_t units() const { return units_; }
  int64_t partial_floats() const { return partial_; }
  // The most that `size` gives for any tiling.
  template <class Size>
  int64_t most(const Size& size) const {
    int64_t found = 0;
    for (const CacheTiling& t : tilings_) found = larger(found, size(t));
    return found;
  }
  int64_t columns() const { return round_up(p_.values.dim, 2 * kLanes); }
  int64_t partial_row() const { return columns() + 2; }

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
    const int64_t from = first(g), end = last(g), tokens = g.tiling.tokens;
    const int64_t blocks = (end - from + tokens - 1) / tokens;
    return {from + blocks * split / g.splits * tokens,
            smaller(from + blocks * (split + 1) / g.splits * tokens, end)};
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
  static constexpr int64_t kSplitBytes = 1 << 20, kMostSplits = 128;

  CacheTiling tiling_of(int64_t rows) const {
    CacheTiling t;
    t.rows = smaller(rows, kUnitRows);
    t.streams = t.rows <= 8;
    // All heads of a token are adjacent in memory, so a unit takes as many as fit the caches together with
    // its state and a block of a few tokens.
    const int64_t state = larger(t.rows, 1) * (p_.keys.dim + p_.values.dim) * 4;
    t.heads = larger(smaller(kStateBytes / state, kWidestBytes / (kFewTokens * token_bytes_)), 1);
    if (!t.streams) t.heads = 1;  // products take most of the time, and long rows of scores speed them up
    const int64_t parts = (p_.heads_kv + t.heads - 1) / t.heads;
    t.heads = (p_.heads_kv + parts - 1) / parts;
    const int64_t tokens = kBlockBytes / (t.heads * token_bytes_) / kFewTokens * kFewTokens;
    t.tokens = larger(smaller(tokens, kMostTokens), kFewTokens);
    return t;
  }

  void add_groups(int64_t sequence, int64_t rows, const CacheTiling& tiling) {
    for (int64_t row = 0; row < rows; row += tiling.rows) {
      for (int64_t h = 0; h < p_.heads_kv; h += tiling.heads) {
        const int64_t heads = smaller(tiling.heads, p_.heads_kv - h),
                      count = smaller(tiling.rows, rows - row);
        CacheGroup g{sequence, h, heads, row, count, 1, tiling, units_, partial_};
        g.splits = splits(g, token_bytes_);
        units_ += g.splits;
        if (g.splits > 1) partial_ += g.splits * g.heads * g.rows * partial_row();
        groups_.push_back(g);
      }
    }
  }

  // A split reads at least a megabyte, and 64 times the bytes of its partial result.
  int64_t splits(const CacheGroup& g, int64_t token) const {
    if (p_.splits > 0) return p_.splits;
    const int64_t bytes = (last(g) - first(g)) * g.heads * token;
    const int64_t partial = g.heads * g.rows * partial_row() * 4;
    return larger(smaller(bytes / larger(kSplitBytes, 64 * partial), kMostSplits), 1);
  }

  const CacheProblem& p_;
  const int64_t token_bytes_;
  int64_t units_ = 0, partial_ = 0;
  std::vector<CacheTiling> tilings_;
  std::vector<CacheGroup> groups_;
};

}  // namespace resformer::RESFORMER_ISA

// The order of work: heads go in waves small enough for their packed operands to stay in cache, and inside a wave any
// thread may take any tile. A wave has at least one head a thread.
#pragma once

#include "attention/attention.h"
#include "attention/scores.h"
#include "common/parallel.h"

namespace resformer::RESFORMER_ISA {

struct KeyTile {
  int64_t sequence, head, key;
  bool attended;  // whether any query may see it by position
};

// Where `unit` lies in ascending prefix sums: the last index whose prefix is not above it.
static inline int64_t find_prefix(const int64_t* prefix, int64_t count, int64_t unit) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (prefix[middle] <= unit ? low : high) = middle;
  }
  return low;
}

// Heads [first, last) counted over sequences and KV heads, with the tiles before each one.
struct Wave {
  const Problem* problem;
  const int64_t *key_prefix, *row_prefix;
  int64_t first, last, tile_rows, tile_keys;
  int64_t key_tiles, row_tiles;

  KeyTile key_tile(int64_t unit) const {
    const int64_t at = unit + key_prefix[first], head = first + find_prefix(key_prefix + first, last - first, at);
    const Sequence& s = problem->sequences[head / problem->heads_kv];
    const int64_t key = (at - key_prefix[head]) * tile_keys;
    const bool attended = s.tq > 0 && key < problem->key_hi(s, s.tq - 1) && key + tile_keys > problem->key_lo(s, 0);
    return {head / problem->heads_kv, head % problem->heads_kv, key, attended};
  }

  // The last rows first: under a causal mask they cost the most.
  RowTile row_tile(int64_t unit) const {
    const int64_t at = unit + row_prefix[first], head = first + find_prefix(row_prefix + first, last - first, at);
    const Sequence& s = problem->sequences[head / problem->heads_kv];
    const int64_t row = (row_prefix[head + 1] - 1 - at) * tile_rows, rows = s.tq * problem->group;
    return {problem, &s, head % problem->heads_kv, row, smaller(tile_rows, rows - row)};
  }

  int64_t head_of(const RowTile& rows) const {
    return (rows.sequence - problem->sequences.data()) * problem->heads_kv + rows.head_kv;
  }
  int64_t packed_keys(const RowTile& rows) const { return key_prefix[head_of(rows)] - key_prefix[first]; }
  int64_t packed_rows(const RowTile& rows) const {
    return row_prefix[head_of(rows)] - row_prefix[first] + rows.first / tile_rows;
  }
};

class WavePlan {
 public:
  // words: scratch a head needs for each key and each row.
  WavePlan(const Problem& p, int64_t tile_rows, int64_t tile_keys, int64_t key_words, int64_t row_words)
      : p_(p), tile_rows_(tile_rows), tile_keys_(tile_keys), key_words_(key_words), row_words_(row_words),
        threads_(torch::stable::get_num_threads()), heads_(p.head_count()), prefixes_(4 * (heads_ + 1)) {
    key_prefix_ = reinterpret_cast<int64_t*>(prefixes_.get());
    row_prefix_ = key_prefix_ + heads_ + 1;
    key_prefix_[0] = row_prefix_[0] = 0;
    for (int64_t head = 0; head < heads_; ++head) {
      const Sequence& s = p.sequences[head / p.heads_kv];
      key_prefix_[head + 1] = key_prefix_[head] + (s.tk + tile_keys - 1) / tile_keys;
      row_prefix_[head + 1] = row_prefix_[head] + (s.tq * p.group + tile_rows - 1) / tile_rows;
    }
  }

  int64_t heads() const { return heads_; }
  int64_t threads() const { return threads_; }

  Wave wave(int64_t first, bool all = false) const {
    // 2 MiB a thread: about the second-level cache of a server core.
    const int64_t budget = threads_ * (int64_t{1} << 19);
    int64_t last = first, words = 0;
    while (last < heads_ && (all || last - first < threads_ || words < budget)) {
      words += (key_prefix_[last + 1] - key_prefix_[last]) * tile_keys_ * key_words_ +
               (row_prefix_[last + 1] - row_prefix_[last]) * tile_rows_ * row_words_;
      ++last;
    }
    return {&p_, key_prefix_, row_prefix_, first, last, tile_rows_, tile_keys_, key_prefix_[last] - key_prefix_[first],
            row_prefix_[last] - row_prefix_[first]};
  }

  // Into how many parts the keys of a unit are cut so that every thread has work: 1 where there are units enough.
  int64_t splits(const Wave& wave, int64_t units) const {
    if (threads_ == 1 || units == 0 || units >= 4 * threads_) return 1;
    int64_t most = 1;
    for (int64_t head = wave.first; head < wave.last; ++head) {
      most = larger(most, key_prefix_[head + 1] - key_prefix_[head]);
    }
    return smaller((4 * threads_ + units - 1) / units, most);
  }

 private:
  const Problem& p_;
  int64_t tile_rows_, tile_keys_, key_words_, row_words_, threads_, heads_;
  Scratch prefixes_;
  int64_t *key_prefix_, *row_prefix_;
};

}  // namespace resformer::RESFORMER_ISA

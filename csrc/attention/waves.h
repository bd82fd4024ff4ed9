// The order of work: heads go in waves small enough for their packed operands to stay in cache. Many small
// heads make waves of a few heads that one thread runs whole, with no barrier; else a wave has at least one
// head a thread, and any thread may take any of its tiles.
#pragma once

#include "attention/attention.h"
#include "attention/scores.h"
#include "common/parallel.h"

namespace resformer::RESFORMER_ISA {

// One tile of keys of the heads [head, head_end) of a sequence: neighbours in memory, so packed together.
struct KeyTile {
  int64_t sequence, head, head_end, key;
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
  const int64_t *key_prefix, *row_prefix;  // by head
  const int64_t* tile_prefix;              // key tiles by sequence
  int64_t first, last, tile_rows, tile_keys;
  int64_t key_tiles, row_tiles;
  int64_t head_chunks;      // parts that a sequence's heads are split into for packing
  float* packed = nullptr;  // scratch of the wave: packed operands,
  float* sums = nullptr;    // and partial sums of dQ

  int64_t key_units() const {
    return (tile_prefix[end_sequence()] - tile_prefix[first / problem->heads_kv]) * head_chunks;
  }
  int64_t key_tiles_of(int64_t head) const { return key_prefix[head + 1] - key_prefix[head]; }
  int64_t most_key_tiles() const {
    int64_t most = 0;
    for (int64_t head = first; head < last; ++head) most = larger(most, key_tiles_of(head));
    return most;
  }
  int64_t end_sequence() const {
    return last == first ? first / problem->heads_kv : (last - 1) / problem->heads_kv + 1;
  }

  KeyTile key_tile(int64_t unit) const {
    const int64_t heads = problem->heads_kv, start = first / heads, chunk = unit % head_chunks;
    const int64_t at = unit / head_chunks + tile_prefix[start];
    const int64_t sequence = start + find_prefix(tile_prefix + start, end_sequence() - start, at);
    const int64_t begin = larger(first - sequence * heads, 0),
                  count = smaller(last - sequence * heads, heads) - begin;
    const Sequence& s = problem->sequences[sequence];
    const int64_t key = (at - tile_prefix[sequence]) * tile_keys;
    const bool attended =
        s.tq > 0 && key < problem->key_hi(s, s.tq - 1) && key + tile_keys > problem->key_lo(s, 0);
    return {sequence, begin + count * chunk / head_chunks, begin + count * (chunk + 1) / head_chunks, key,
            attended};
  }
  int64_t packed_tile(const KeyTile& tile, int64_t head) const {
    return key_prefix[tile.sequence * problem->heads_kv + head] - key_prefix[first] + tile.key / tile_keys;
  }

  // The last rows first: under a causal mask they cost the most.
  RowTile row_tile(int64_t unit) const {
    const int64_t at = unit + row_prefix[first],
                  head = first + find_prefix(row_prefix + first, last - first, at);
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
      : p_(p),
        tile_rows_(tile_rows),
        tile_keys_(tile_keys),
        key_words_(key_words),
        row_words_(row_words),
        threads_(torch::stable::get_num_threads()),
        heads_(p.head_count()),
        prefixes_(6 * (heads_ + 1)) {
    key_prefix_ = reinterpret_cast<int64_t*>(prefixes_.get());
    row_prefix_ = key_prefix_ + heads_ + 1;
    tile_prefix_ = row_prefix_ + heads_ + 1;
    key_prefix_[0] = row_prefix_[0] = tile_prefix_[0] = 0;
    for (int64_t head = 0; head < heads_; ++head) {
      const Sequence& s = p.sequences[head / p.heads_kv];
      key_prefix_[head + 1] = key_prefix_[head] + (s.tk + tile_keys - 1) / tile_keys;
      row_prefix_[head + 1] = row_prefix_[head] + (s.tq * p.group + tile_rows - 1) / tile_rows;
      const int64_t sequence = head / p.heads_kv;
      tile_prefix_[sequence + 1] = tile_prefix_[sequence] + (s.tk + tile_keys - 1) / tile_keys;
    }
  }

  int64_t heads() const { return heads_; }

  // Number of heads that a thread takes at a time to run them whole; 0 where heads are too few or too large.
  int64_t heads_a_thread() const {
    const int64_t fair = heads_ / (8 * threads_);
    if (threads_ == 1 || fair == 0 || words(0, 1) > kThreadWords) return 0;
    int64_t heads = 1;
    while (heads < fair && words(0, heads + 1) <= kThreadWords / 2) ++heads;
    return heads;
  }

  // The wave from `first` on that all threads share. A head a thread is enough, and so are `key_tiles` a
  // thread where tiles of keys are units.
  Wave shared_wave(int64_t first, bool all = false, int64_t key_tiles = 1 << 30) const {
    const auto enough = [&](int64_t last) {
      return (last - first >= threads_ || key_prefix_[last] - key_prefix_[first] >= threads_ * key_tiles) &&
             words(first, last) >= threads_ * kThreadWords;
    };
    int64_t last = first;
    while (last < heads_ && (all || !enough(last))) ++last;
    Wave wave = this->wave(first, last);
    const int64_t units = wave.key_units();
    if (threads_ > 1 && units > 0)
      wave.head_chunks = smaller((4 * threads_ + units - 1) / units, p_.heads_kv);
    return wave;
  }

  Wave wave(int64_t first, int64_t last) const {
    return {&p_,
            key_prefix_,
            row_prefix_,
            tile_prefix_,
            first,
            last,
            tile_rows_,
            tile_keys_,
            key_prefix_[last] - key_prefix_[first],
            row_prefix_[last] - row_prefix_[first],
            1};
  }

  // Number of parts that the keys of a unit are split into, so that every thread has work: 1 where there are
  // enough units.
  int64_t splits(const Wave& wave, int64_t units) const {
    if (threads_ == 1 || units == 0 || units >= 4 * threads_) return 1;
    return smaller((4 * threads_ + units - 1) / units, larger(wave.most_key_tiles(), 1));
  }

 private:
  // 2 MiB, about the second-level cache of a server core.
  static constexpr int64_t kThreadWords = int64_t{1} << 19;

  int64_t words(int64_t first, int64_t last) const {
    return (key_prefix_[last] - key_prefix_[first]) * tile_keys_ * key_words_ +
           (row_prefix_[last] - row_prefix_[first]) * tile_rows_ * row_words_;
  }

  const Problem& p_;
  int64_t tile_rows_, tile_keys_, key_words_, row_words_, threads_, heads_;
  Scratch prefixes_;
  int64_t *key_prefix_, *row_prefix_, *tile_prefix_;
};

}  // namespace resformer::RESFORMER_ISA

// Forward: out = softmax(scale Q K^T ...) V', tiled as in FlashAttention, with V' = lambda_v V + lambda_first
// V1 mixed while it is packed. See resformer_kernels/attention/README.md for the derivation and the tiling.
#pragma once

#include "attention/pack.h"
#include "attention/scores.h"
#include "attention/waves.h"
#include "common/epilogue_rows.h"

namespace resformer::RESFORMER_ISA {

// 192 keys: three panels of 64 or 32 blocks of 6; V's panel and a block of scores stay in L1.
constexpr int64_t kRows = 144;
constexpr int64_t kKeys = 192;
static_assert(kRows <= kMostRows);

template <class T, class Dot, Precision precision>
class Forward {
 public:
  Forward(const Problem& p, const ForwardOutput& out) : p_(p), out_(out) {}

  void run() {
    const WavePlan plan(p_, kRows, kKeys, key_words(kKeys) / kKeys, 0);
    if (const int64_t heads = plan.heads_a_thread()) return run_whole(plan, heads);
    Scratch packed{0};
    for (int64_t head = 0; head < plan.heads();) {
      Wave wave = plan.shared_wave(head);
      head = wave.last;
      wave.packed = packed.at_least(wave.key_tiles * key_words(kKeys));
      run_shared(wave, plan.splits(wave, wave.row_tiles));
    }
  }

 private:
  using Unit = Scores<precision>;

  int64_t columns() const { return round_up(p_.dim_v, kLanes); }
  int64_t key_words(int64_t keys) const {  // words that K^T and V' of `keys` keys take
    return keys * row_words<Dot>(p_.dim_k) + (keys + Dot::kPack - 1) / Dot::kPack * columns();
  }
  int64_t partial_row() const { return columns() + 2; }
  float* keys_of(const Wave& wave, int64_t tile) const { return wave.packed + tile * key_words(kKeys); }
  float* values_of(const Wave& wave, int64_t tile) const {
    return keys_of(wave, tile) + kKeys * row_words<Dot>(p_.dim_k);
  }

  void run_whole(const WavePlan& plan, int64_t heads) {
    struct Own {
      explicit Own(const Problem& p) : pack(p), attend(p) {}
      PackScratch pack;
      AttendScratch attend;
    };
    parallel_units((plan.heads() + heads - 1) / heads, [&] { return Own(p_); },
                   [&](int64_t unit, Own& own) {
                     Wave wave = plan.wave(unit * heads, smaller((unit + 1) * heads, plan.heads()));
                     wave.packed = own.pack.packed.at_least(wave.key_tiles * key_words(kKeys));
                     for (int64_t i = 0; i < wave.key_units(); ++i) pack(wave, i, own.pack);
                     for (int64_t i = 0; i < wave.row_tiles; ++i) attend(wave, i, 1, own.attend, nullptr);
                   });
  }

  void run_shared(const Wave& wave, int64_t splits) {
    parallel_units(
        wave.key_units(), [&] { return PackScratch(p_); },
        [&](int64_t unit, PackScratch& s) { pack(wave, unit, s); });
    const Scratch partial(splits > 1 ? wave.row_tiles * splits * kRows * partial_row() : 0);
    parallel_units(
        wave.row_tiles * splits, [&] { return AttendScratch(p_); },
        [&](int64_t unit, AttendScratch& s) { attend(wave, unit, splits, s, partial.get()); });
    if (splits == 1) return;
    parallel_units(
        wave.row_tiles, [&] { return AttendScratch(p_); },
        [&](int64_t unit, AttendScratch& s) { merge(wave, unit, splits, s, partial.get()); });
  }

  struct PackScratch {
    explicit PackScratch(const Problem& p)
        : rows(kLanes * row_words<Dot>(p.dim_k)), values(2 * round_up(p.dim_v, kLanes)), packed(0), mix(p) {}
    Scratch rows, values, packed;
    ValueRow mix;
  };

  void pack(const Wave& wave, int64_t unit, PackScratch& s) {
    const KeyTile tile = wave.key_tile(unit);
    if (!tile.attended && !out_.mixed.data) return;
    const Sequence& seq = p_.sequences[tile.sequence];
    const int64_t keys = smaller(kKeys, seq.tk - tile.key), padded = lane_ceil(keys),
                  words = row_words<Dot>(p_.dim_k);
    // A few keys of every head at a time: the heads of a token are neighbours in memory.
    for (int64_t r = 0; r < padded; r += kLanes) {
      const int64_t count = smaller(kLanes, keys - r), t = seq.k_start + tile.key + r;
      for (int64_t head = tile.head; head < tile.head_end; ++head) {
        const int64_t packed = wave.packed_tile(tile, head);
        if (tile.attended) {
          for (int64_t i = 0; i < count; ++i) {
            // Prefetch the next keys of this head: too far away for the hardware prefetcher, and spread over
            // the work rather than in a burst.
            const int64_t next = smaller(t + kLanes + i, seq.k_start + seq.tk - 1);
            prefetch_row(p_.k.row<const T>(seq.batch, next, head), p_.dim_k * sizeof(T));
            if (p_.v.data) prefetch_row(p_.v.row<const T>(seq.batch, next, head), p_.dim_v * sizeof(T));
            if (p_.v_first.data)
              prefetch_row(p_.v_first.row<const T>(seq.batch, next, head), p_.dim_v * sizeof(T));
            pack_row<Dot>(p_.k.row<const T>(seq.batch, t + i, head), p_.dim_k, s.rows.get() + i * words);
          }
          pack_transposed(s.rows.get(), words, count, words, r, padded, keys_of(wave, packed));
        }
        pack_values(seq.batch, t, head, count, tile.attended, r, padded, values_of(wave, packed), s);
      }
    }
  }

  // Keys t to t + count of V' as rows [r, r + kLanes) of the tile's words, zero past count.
  void pack_values(int64_t b, int64_t t, int64_t head, int64_t count, bool attended, int64_t r,
                   int64_t padded, float* out, PackScratch& s) {
    const int64_t width = columns();
    T* buffers[2] = {reinterpret_cast<T*>(s.values.get()), reinterpret_cast<T*>(s.values.get() + width)};
    for (int64_t n = 0; n < kLanes; n += Dot::kPack) {
      const T* rows[2] = {nullptr, nullptr};
      for (int64_t i = 0; i < Dot::kPack; ++i) {
        if (n + i >= count) {
          memset(buffers[i], 0, p_.dim_v * sizeof(T));
          rows[i] = buffers[i];
          continue;
        }
        rows[i] = s.mix.get(b, t + n + i, head, buffers[i]);
        if (out_.mixed.data) memcpy(out_.mixed.row<T>(b, t + n + i, head), rows[i], p_.dim_v * sizeof(T));
      }
      if (attended) store_value_row(rows, (r + n) / Dot::kPack, padded / Dot::kPack, out);
    }
  }

  // Row `n` (of words) of V' into its panels of columns.
  void store_value_row(const T* const* rows, int64_t n, int64_t count, float* out) const {
    const int64_t width = columns();
    for (int64_t first = 0; first < width; first += kPanel) {
      const int64_t panel = smaller(kPanel, width - first), dim = larger(smaller(panel, p_.dim_v - first), 0);
      float* dst = out + first * count + n * panel;
      if constexpr (Dot::kPack == 2) {
        interleave_rows(rows[0] + first, rows[1] + first, dim, panel, dst);
      } else {
        int64_t d = 0;
        for (; d + kLanes <= dim; d += kLanes) store(dst + d, load(rows[0] + first + d));
        for (; d < dim; ++d) dst[d] = to_float(rows[0][first + d]);
        for (; d < panel; ++d) dst[d] = 0.0f;
      }
    }
  }

  struct AttendScratch {
    explicit AttendScratch(const Problem& p)
        : q(kRows * row_words<Dot>(p.dim_k)),
          scores(kRows * kKeys),
          acc(kRows * round_up(p.dim_v, kLanes)),
          bias(kKeys),
          gate(round_up(p.dim_v, kLanes)),
          own(p.dim_v) {}
    typename Dot::Session session;
    Scratch q, scores, acc, bias, gate;
    OwnValue own;
    RowState state[kRows];
    Bounds bounds;
    Span spans[(kRows + kTileRows - 1) / kTileRows];
    Span words[(kRows + kTileRows - 1) / kTileRows];
  };

  void attend(const Wave& wave, int64_t unit, int64_t splits, AttendScratch& s, float* partial) {
    const RowTile rows = wave.row_tile(unit / splits);
    s.bounds.read(rows);
    const int64_t q_words = row_words<Dot>(p_.dim_k);
    const Sequence& seq = *rows.sequence;
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t t = seq.q_start + rows.query(r);
      pack_row<Dot>(p_.q.row<const T>(seq.batch, t, rows.head(r)), p_.dim_k, s.q.get() + r * q_words);
      s.state[r].m = kMinusInf;
      store(s.state[r].l, zero());
    }
    memset(s.acc.get(), 0, rows.count * columns() * sizeof(float));
    const int64_t begin = s.bounds.lo[0] / kKeys, end = (s.bounds.hi[rows.count - 1] + kKeys - 1) / kKeys;
    const int64_t tiles = larger(end - begin, 0), split = unit % splits;
    const int64_t from = begin + tiles * split / splits, to = begin + tiles * (split + 1) / splits;
    for (int64_t j = from; j < to; ++j) {
      attend_tile(wave, rows, j * kKeys, wave.packed_keys(rows) + j, j == from, s);
    }
    s.own.reset();
    for (int64_t r = 0; r < rows.count; ++r) {
      const float l = reduce_add(load(s.state[r].l));
      float* acc = s.acc.get() + r * columns();
      if (splits == 1) {
        finish(wave, rows, r, s.state[r].m, l, acc, s);
      } else {
        float* row = partial + (unit * kRows + r) * partial_row();
        memcpy(row, acc, columns() * sizeof(float));
        row[columns()] = s.state[r].m;
        row[columns() + 1] = l;
      }
    }
  }

  void attend_tile(const Wave& wave, const RowTile& rows, int64_t key, int64_t packed_tile, bool first,
                   AttendScratch& s) {
    const int64_t keys = smaller(kKeys, rows.sequence->tk - key), padded = lane_ceil(keys);
    const int64_t q_words = row_words<Dot>(p_.dim_k);
    block_spans(s.bounds, rows.count, key, keys, s.spans);
    if (!tile_is_open(rows, key, keys, s.spans)) return;
    gemm_scores<Dot>(s.q.get(), q_words, packed_panels(keys_of(wave, packed_tile), q_words, padded),
                     (p_.dim_k + Dot::kPack - 1) / Dot::kPack, rows.count, s.spans,
                     score_alpha<precision>(p_), s.scores.get(), kKeys);
    for (int64_t r = 0; r < rows.count; r += kRowsAbreast) {
      if (first) prefetch_next_rows(rows, r);
      if (r + kRowsAbreast <= rows.count) {
        softmax<kRowsAbreast>(rows, r, key, keys, s);
      } else {
        for (int64_t i = r; i < rows.count; ++i) softmax<1>(rows, i, key, keys, s);
      }
    }
    for (int64_t b = 0; b * kTileRows < rows.count; ++b) {
      s.words[b] = {s.spans[b].lo / Dot::kPack, (s.spans[b].hi + Dot::kPack - 1) / Dot::kPack};
    }
    gemm_accumulate<Dot>(s.scores.get(), kKeys, 1,
                         packed_panels(values_of(wave, packed_tile), padded / Dot::kPack, columns()),
                         rows.count, s.words, s.acc.get(), columns());
  }

  // Softmax of rows [r, r + count) of one block.
  template <int count>
  void softmax(const RowTile& rows, int64_t r, int64_t key, int64_t keys, AttendScratch& s) {
    const Span span = s.spans[r / kTileRows];
    if (span.lo >= span.hi) return;
    const int64_t from = lane_floor(span.lo), to = lane_ceil(span.hi);
    float* scores = s.scores.get() + r * kKeys;
    if (needs_transform(p_)) {
      for (int64_t i = 0; i < count; ++i) {
        transform_row<precision>(rows, r + i, key, keys, from, to, s.bias.get(), scores + i * kKeys, nullptr);
      }
    }
    softmax_rows<Dot, precision, count>(scores, kKeys, from, to, s.bounds.lo + r, s.bounds.hi + r, key,
                                        s.state + r, s.acc.get() + r * columns(), columns());
  }

  // Prefetches rows of the next tile of Q while this tile passes over its first keys.
  void prefetch_next_rows(const RowTile& rows, int64_t r) {
    if (rows.first < kRows) return;
    for (int64_t i = r - kRows; i < r - kRows + kRowsAbreast; ++i) {
      const int64_t t = rows.sequence->q_start + rows.query(i);
      prefetch_row(p_.q.row<const T>(rows.sequence->batch, t, rows.head(i)), p_.dim_k * sizeof(T));
    }
  }

  // Joins the splits of a row tile: each is a softmax over its own keys, weighted by exp of its maximum.
  void merge(const Wave& wave, int64_t unit, int64_t splits, AttendScratch& s, const float* partial) {
    const RowTile rows = wave.row_tile(unit);
    s.own.reset();
    for (int64_t r = 0; r < rows.count; ++r) {
      float m = kMinusInf, l = 0.0f;
      float* acc = s.acc.get();
      for (int64_t i = 0; i < splits; ++i) {
        const float* row = partial + ((unit * splits + i) * kRows + r) * partial_row();
        m = row[columns()] > m ? row[columns()] : m;
      }
      memset(acc, 0, columns() * sizeof(float));
      for (int64_t i = 0; i < splits; ++i) {
        const float* row = partial + ((unit * splits + i) * kRows + r) * partial_row();
        const float own = row[columns()];
        const float weight =
            own == kMinusInf ? (row[columns() + 1] == 0.0f ? 0.0f : 1.0f) : Unit::exp(own - m);
        l += weight * row[columns() + 1];
        for (int64_t d = 0; d < columns(); d += kLanes)
          store(acc + d, fma(set1(weight), load(row + d), load(acc + d)));
      }
      finish(wave, rows, r, m, l, acc, s);
    }
  }

  // Writes out and LSE of a row whose keys have all been seen.
  void finish(const Wave& wave, const RowTile& rows, int64_t r, float m, float l, float* acc,
              AttendScratch& s) {
    const Sequence& seq = *rows.sequence;
    const int64_t head = rows.head(r), t = seq.q_start + rows.query(r);
    const auto [factor, lse] = close_row<Unit>(m, l, p_.sinks ? p_.sinks + head : nullptr, out_.lse);
    T* out = out_.out.row<T>(seq.batch, t, head);
    const int64_t number =
        seq.batch * out_.lse_stride[0] + head * out_.lse_stride[1] + t * out_.lse_stride[2];
    if (!p_.epilogue.any()) {
      scale_row(acc, factor, p_.dim_v, out);
    } else {
      if (p_.epilogue.excludes) read_own(wave, rows, t - seq.q_start, s.own);
      T* ungated = out_.ungated.data ? out_.ungated.row<T>(seq.batch, t, head) : nullptr;
      const float along = finish_row(p_.epilogue, s.own, seq.batch, t, head, p_.dim_v, factor, s.gate.get(),
                                     acc, ungated, out);
      if (out_.along) out_.along[number] = along;
    }
    if (out_.lse) out_.lse[number] = lse;
  }

  // V' at query i's own position, from the packed tile: a window always holds that position.
  void read_own(const Wave& wave, const RowTile& rows, int64_t i, OwnValue& own) const {
    const Sequence& seq = *rows.sequence;
    own.at(i, p_.epilogue.least, [&](float* w) -> const float* {
      const int64_t key = i + seq.diagonal, tile = key / kKeys, n = key % kKeys;
      if (key < 0) return nullptr;
      const int64_t count = lane_ceil(smaller(kKeys, seq.tk - tile * kKeys)) / Dot::kPack;
      const float* values = values_of(wave, wave.packed_keys(rows) + tile);
      for (int64_t first = 0; first < columns(); first += kPanel) {
        const int64_t panel = smaller(kPanel, columns() - first);
        const float* row = values + first * count + n / Dot::kPack * panel;
        if constexpr (Dot::kPack == 2) {
          const uint32_t* words = reinterpret_cast<const uint32_t*>(row);
          uint32_t* bits = reinterpret_cast<uint32_t*>(w + first);
          for (int64_t d = 0; d < panel; ++d) bits[d] = n % 2 ? words[d] & 0xffff0000u : words[d] << 16;
        } else if (panel == columns()) {
          return row;
        } else {
          memcpy(w + first, row, panel * sizeof(float));
        }
      }
      return w;
    });
  }

  const Problem& p_;
  const ForwardOutput& out_;
};

}  // namespace resformer::RESFORMER_ISA

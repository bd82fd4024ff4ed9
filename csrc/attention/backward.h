// Backward, keys stationary: V' is mixed again once per tile of keys, the loop runs over the row tiles that
// see it, and the epilogue turns dV' into lambda_v dV', lambda_first dV' and the coefficients' partial
// sums. See resformer_kernels/attention/README.md for the equations.
#pragma once

#include "attention/grad_rows.h"
#include "attention/turns.h"

namespace resformer::RESFORMER_ISA {

template <class T, class Dot, Precision precision>
class Backward {
 public:
  Backward(const Problem& p, const BackwardInput& in, const BackwardOutput& out)
      : p_(p), in_(in), out_(out), rows_(p, in, out) {}

  void run() {
    const WavePlan plan(p_, kGradRows, kGradKeys, 0, rows_.tile_words() / kGradRows + columns_k());
    const int64_t heads = out_.bias_shared ? 0 : plan.heads_a_thread();
    if (heads > 0) return run_whole(plan, heads);
    Scratch packed{0}, sums{0};
    for (int64_t head = 0; head < plan.heads();) {
      Wave wave = plan.shared_wave(head, out_.bias_shared, kTilesAThread);
      head = wave.last;
      run_shared(wave, packed, sums);
    }
  }

 private:
  static constexpr bool kPairs = Dot::kPack == 2;
  // Enough that the last ones, which are the longest under a causal mask, are a small part of the time.
  static constexpr int64_t kTilesAThread = 32;
  using RowScratch = typename GradRows<T, Dot, precision>::RowScratch;

  int64_t columns_k() const { return round_up(p_.dim_k, kLanes); }
  int64_t columns_v() const { return round_up(p_.dim_v, kLanes); }
  int64_t words_k() const { return row_words<Dot>(p_.dim_k); }
  int64_t words_v() const { return row_words<Dot>(p_.dim_v); }

  void run_whole(const WavePlan& plan, int64_t heads) {
    parallel_units((plan.heads() + heads - 1) / heads, [&] { return KeyScratch(p_); },
                   [&](int64_t unit, KeyScratch& s) {
                     Wave wave = plan.wave(unit * heads, smaller((unit + 1) * heads, plan.heads()));
                     wave.packed = s.packed.at_least(wave.row_tiles * rows_.tile_words());
                     wave.sums = s.sums.at_least(wave.row_tiles * kGradRows * columns_k());
                     for (int64_t i = 0; i < wave.row_tiles; ++i) start_rows(wave, i, s.rows);
                     for (int64_t head = wave.first; head < wave.last; ++head) run_head(wave, head, s);
                     for (int64_t i = 0; i < wave.row_tiles; ++i) write_dq(wave, i);
                   });
  }

  void run_shared(Wave& wave, Scratch& packed, Scratch& sums) {
    wave.packed = packed.at_least(wave.row_tiles * rows_.tile_words());
    wave.sums = sums.at_least(wave.row_tiles * kGradRows * columns_k());
    parallel_units(
        wave.row_tiles, [&] { return RowScratch(p_); },
        [&](int64_t unit, RowScratch& s) { start_rows(wave, unit, s); });
    run_keys(wave);
    parallel_units(wave.row_tiles, [] { return 0; }, [&](int64_t unit, int) { write_dq(wave, unit); });
  }

  // A unit is a tile of keys; heads take turns, so that two threads seldom add to the same rows.
  void run_keys(const Wave& wave) {
    const auto make = [&] { return KeyScratch(p_); };
    const bool owns_columns = !out_.bias.wanted() || out_.bias.stride[3] != 0;
    // Heads that add to the same entries of the bias gradient run in order inside one unit.
    const int64_t heads = wave.last - wave.first, groups = out_.bias_shared ? 1 : heads,
                  together = heads / groups;
    if (!owns_columns) {
      return parallel_units(groups, make, [&](int64_t unit, KeyScratch& s) {
        for (int64_t i = 0; i < together; ++i) run_head(wave, wave.first + unit * together + i, s);
      });
    }
    const Turns turns(wave.row_tiles);
    parallel_units(groups * wave.most_key_tiles(), make, [&](int64_t unit, KeyScratch& s) {
      for (int64_t i = 0; i < together; ++i) {
        const int64_t head = wave.first + unit % groups * together + i;
        const int64_t tile = wave.key_tiles_of(head) - 1 - unit / groups;
        if (tile >= 0) run_tile_of_keys(wave, head, tile, &turns, s);
      }
    });
  }

  float* dq_tile(const Wave& wave, int64_t tile) const { return wave.sums + tile * kGradRows * columns_k(); }

  void start_rows(const Wave& wave, int64_t unit, RowScratch& s) const {
    rows_.pack(wave, unit, s);
    memset(dq_tile(wave, unit), 0, kGradRows * columns_k() * sizeof(float));
  }

  struct KeyScratch {
    explicit KeyScratch(const Problem& p)
        : k(kGradKeys * round_up(p.dim_k, kLanes)),
          k_pairs(kPairs ? kGradKeys / 2 * round_up(p.dim_k, kLanes) : 1),
          k_t(kGradKeys * row_words<Dot>(p.dim_k)),
          v_t(kGradKeys * row_words<Dot>(p.dim_v)),
          v(kLanes * row_words<Dot>(p.dim_v)),
          mixed(round_up(p.dim_v, kLanes)),
          dk(kGradKeys * round_up(p.dim_k, kLanes)),
          dv(kGradKeys * round_up(p.dim_v, kLanes)),
          p(kGradRows * kGradKeys),
          ds(kGradRows * kGradKeys),
          p_pairs(kPairs ? kGradRows / 2 * kGradKeys : 1),
          ds_pairs(kPairs ? kGradRows / 2 * kGradKeys : 1),
          slope(p.softcap > 0.0f ? kGradKeys : 1),
          bias(kGradKeys),
          mix(p),
          rows(p) {}
    Scratch k, k_pairs, k_t, v_t, v, mixed, dk, dv, p, ds, p_pairs, ds_pairs, slope, bias;
    typename Dot::Session session;
    Scratch packed{0}, sums{0};  // used by a thread that runs whole heads
    ValueRow mix;
    RowScratch rows;
    Bounds bounds;
    Span spans[(kGradRows + kTileRows - 1) / kTileRows];    // keys of each block of rows
    Span words[(kGradRows + kTileRows - 1) / kTileRows];    // the same in words
    Span queries[(kGradKeys + kTileRows - 1) / kTileRows];  // rows (in words) of each block of keys
  };

  void run_head(const Wave& wave, int64_t head, KeyScratch& s) {
    for (int64_t tile = wave.key_tiles_of(head) - 1; tile >= 0; --tile)
      run_tile_of_keys(wave, head, tile, nullptr, s);
  }

  // Tiles of keys go from the last to the first, and through rows from the first to the last: under a causal
  // mask or a window a tile then starts at rows that the tile before it has left. `turns` is null where one
  // thread runs all of them.
  void run_tile_of_keys(const Wave& wave, int64_t head, int64_t tile, const Turns* turns, KeyScratch& s) {
    const int64_t sequence = head / p_.heads_kv, head_kv = head % p_.heads_kv;
    const Sequence& seq = p_.sequences[sequence];
    const int64_t row_tiles = wave.row_prefix[head + 1] - wave.row_prefix[head];
    const int64_t packed = wave.row_prefix[head] - wave.row_prefix[wave.first];
    const int64_t key = tile * kGradKeys, keys = smaller(kGradKeys, seq.tk - key);
    pack_keys(seq, head_kv, key, keys, s);
    memset(s.dk.get(), 0, kGradKeys * columns_k() * sizeof(float));
    memset(s.dv.get(), 0, kGradKeys * columns_v() * sizeof(float));
    for (int64_t i = 0; i < row_tiles; ++i) {
      const int64_t first = i * kGradRows;
      const RowTile rows{&p_, &seq, head_kv, first, smaller(kGradRows, seq.tq * p_.group - first)};
      const int64_t end = rows.hi(rows.count - 1);
      if (rows.lo(0) >= key + keys || end <= key) continue;
      s.bounds.read(rows);
      const bool open = run_tile(rows, key, keys, rows_.at(wave, packed + i), s);
      if (turns) turns->wait(packed + i, (end - 1) / kGradKeys - tile);
      if (open) add_dq(rows.count, dq_tile(wave, packed + i), s);
      if (turns) turns->pass(packed + i);
    }
    if (p_.epilogue.excludes) add_own_gradients(wave, seq, head_kv, packed, key, keys, s);
    for (int64_t n = 0; n < keys; ++n) write_key(seq, head_kv, key + n, n, s);
    if (out_.lambda_v_partial == Partial::column)
      write_column(seq, head_kv, key, keys, p_.v, out_.lambda_v, s);
    if (out_.lambda_first_partial == Partial::column)
      write_column(seq, head_kv, key, keys, p_.v_first, out_.lambda_first, s);
  }

  void pack_keys(const Sequence& seq, int64_t head, int64_t key, int64_t keys, KeyScratch& s) {
    const int64_t padded = lane_ceil(keys), stride_k = words_k(), stride_v = words_v();
    for (int64_t r = 0; r < padded; r += kLanes) {
      const int64_t count = smaller(kLanes, keys - r);
      pack_key_rows<Dot, T>(p_.k, seq.batch, seq.k_start + key + r, head, p_.dim_k, count, r, padded,
                            s.k.get(), s.k_t.get());
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = seq.k_start + key + r + i;
        const T* value = s.mix.get(seq.batch, t, head, reinterpret_cast<T*>(s.mixed.get()));
        pack_row<Dot>(value, p_.dim_v, s.v.get() + i * stride_v);
      }
      pack_transposed(s.v.get(), stride_v, count, stride_v, r, padded, s.v_t.get());
    }
    if constexpr (kPairs) {
      for (int64_t r = 0; r < keys; r += 2) {
        interleave_words(s.k.get(), stride_k, r, r + 1 == keys, columns_k(), s.k_pairs.get());
      }
    }
  }

  // Scores of rows and keys, and what they add to dK and dV'; false where a mask hides all of them.
  bool run_tile(const RowTile& rows, int64_t key, int64_t keys, const RowPack& pack, KeyScratch& s) {
    const int64_t padded = lane_ceil(keys);
    block_spans(s.bounds, rows.count, key, keys, s.spans);
    if (!tile_is_open(rows, key, keys, s.spans)) return false;
    gemm_scores<Dot>(pack.q, words_k(), packed_panels(s.k_t.get(), words_k(), padded),
                     (p_.dim_k + Dot::kPack - 1) / Dot::kPack, rows.count, s.spans,
                     score_alpha<precision>(p_), s.p.get(), kGradKeys);
    gemm_scores<Dot>(pack.grad, words_v(), packed_panels(s.v_t.get(), words_v(), padded),
                     (p_.dim_v + Dot::kPack - 1) / Dot::kPack, rows.count, s.spans, 1.0f, s.ds.get(),
                     kGradKeys);
    for (int64_t r = 0; r < rows.count; ++r) score_gradient(rows, r, key, keys, pack, s);
    if constexpr (kPairs) interleave_scores(rows.count, s);
    product_spans(rows.count, keys, s);
    const float *p_t = kPairs ? s.p_pairs.get() : s.p.get(), *ds_t = kPairs ? s.ds_pairs.get() : s.ds.get();
    gemm_accumulate<Dot>(p_t, 1, kGradKeys, row_major(kPairs ? pack.grad_pairs : pack.grad, columns_v()),
                         keys, s.queries, s.dv.get(), columns_v());
    gemm_accumulate<Dot>(ds_t, 1, kGradKeys, row_major(kPairs ? pack.q_pairs : pack.q, columns_k()), keys,
                         s.queries, s.dk.get(), columns_k());
    return true;
  }

  void add_dq(int64_t rows, float* dq, KeyScratch& s) const {
    gemm_accumulate<Dot>(s.ds.get(), kGradKeys, 1,
                         row_major(kPairs ? s.k_pairs.get() : s.k.get(), columns_k()), rows, s.words, dq,
                         columns_k());
  }

  // P = exp(S - LSE) and dS = P (dP - delta) for one row, zero outside the row's keys up to whole blocks of
  // keys.
  void score_gradient(const RowTile& rows, int64_t r, int64_t key, int64_t keys, const RowPack& pack,
                      KeyScratch& s) {
    const Span span = s.spans[r / kTileRows];
    if (span.lo >= span.hi) return;
    const int64_t from = lane_floor(span.lo), to = lane_ceil(span.hi);
    float *p = s.p.get() + r * kGradKeys, *ds = s.ds.get() + r * kGradKeys;
    const bool capped = p_.softcap > 0.0f;
    if (needs_transform(p_))
      transform_row<precision>(rows, r, key, keys, from, to, s.bias.get(), p,
                               capped ? s.slope.get() : nullptr);
    const int64_t lo = s.bounds.lo[r] - key, hi = s.bounds.hi[r] - key;
    mask_rows<1>(p, 0, from, to, s.bounds.lo + r, s.bounds.hi + r, key);
    Vec lse = set1(pack.lse[r]);
    if (pack.rest[r] != 0.0f) {
      for (int64_t c = from; c < to; c += kLanes) store(p + c, sub(load(p + c), lse));
      lse = set1(pack.rest[r]);
    }
    const Vec delta = set1(pack.delta[r]);
    for (int64_t c = from; c < to; c += kLanes) {
      const Vec probability = Scores<precision>::exp(sub(load(p + c), lse));
      store(p + c, probability);
      store(ds + c, mul(probability, sub(load(ds + c), delta)));
    }
    if (out_.bias.wanted()) add_bias_gradient(rows, r, key, smaller(hi, keys), larger(lo, 0), ds);
    if (capped) {
      for (int64_t c = from; c < to; c += kLanes) store(ds + c, mul(load(ds + c), load(s.slope.get() + c)));
    }
    const int64_t block_from = from / kTileRows * kTileRows,
                  block_to = smaller(round_up(to, kTileRows), kGradKeys);
    for (int64_t c = block_from; c < from; ++c) p[c] = ds[c] = 0.0f;
    for (int64_t c = to; c < block_to; ++c) p[c] = ds[c] = 0.0f;
  }

  void add_bias_gradient(const RowTile& rows, int64_t r, int64_t key, int64_t hi, int64_t lo,
                         const float* ds) {
    const int64_t* stride = out_.bias.stride;
    const int64_t at =
        rows.sequence->batch * stride[0] + rows.head(r) * stride[1] + rows.query(r) * stride[2];
    for (int64_t c = lo; c < hi; ++c) {
      const int64_t entry = at + (key + c) * stride[3];
      if (out_.bias.sums) {
        out_.bias.sums[entry] += ds[c];
      } else {
        out_.bias.data[entry] += ds[c];
      }
    }
  }

  // Rounds P and dS to bfloat16: dS in place by rows (for dQ), and both in pairs of rows (for dK and dV').
  void interleave_scores(int64_t count, KeyScratch& s) const {
    alignas(64) bf16 none[kGradKeys] = {};
    for (int64_t r = 0; r < count; r += 2) {
      const Span span = s.spans[r / kTileRows];
      if (span.lo >= span.hi) continue;
      const int64_t from = lane_floor(span.lo) / kTileRows * kTileRows;
      const int64_t to = smaller(round_up(lane_ceil(span.hi), kTileRows), kGradKeys);
      const int64_t start = lane_floor(from), end = lane_ceil(to);
      const bool last = r + 1 == count;
      for (float* scores : {s.p.get(), s.ds.get()}) {
        for (int64_t i = r; i < r + (last ? 1 : 2); ++i) {
          float* row = scores + i * kGradKeys;
          for (int64_t c = start; c < end; c += kLanes)
            store(reinterpret_cast<bf16*>(row) + c, load(row + c));
        }
        float* pairs = (scores == s.p.get() ? s.p_pairs : s.ds_pairs).get() + r / 2 * kGradKeys + start;
        const bf16* first = reinterpret_cast<const bf16*>(scores + r * kGradKeys) + start;
        const bf16* second =
            last ? none : reinterpret_cast<const bf16*>(scores + (r + 1) * kGradKeys) + start;
        interleave_rows(first, second, end - start, end - start, pairs);
      }
    }
  }

  // The spans of the three accumulating products: keys of a block of rows, and rows of a block of keys.
  void product_spans(int64_t count, int64_t keys, KeyScratch& s) const {
    const int64_t blocks = (count + kTileRows - 1) / kTileRows;
    for (int64_t b = 0; b < blocks; ++b) {
      s.words[b] = {s.spans[b].lo / Dot::kPack, (s.spans[b].hi + Dot::kPack - 1) / Dot::kPack};
    }
    int64_t first = 0, last = 0;
    for (int64_t n = 0; n < keys; n += kTileRows) {
      // Spans move right with the row, so the blocks that see these keys are consecutive.
      while (first < blocks && (s.spans[first].hi <= n || s.spans[first].lo >= s.spans[first].hi)) ++first;
      last = larger(last, first);
      while (last < blocks && s.spans[last].lo < n + kTileRows && s.spans[last].lo < s.spans[last].hi) ++last;
      const int64_t lo = first * kTileRows, hi = smaller(last * kTileRows, count);
      s.queries[n / kTileRows] = {static_cast<int32_t>(lo / Dot::kPack),
                                  static_cast<int32_t>((hi + Dot::kPack - 1) / Dot::kPack)};
    }
  }

  // What the queries that stand at a tile's keys add to the gradients of the values there: see RowPack.
  void add_own_gradients(const Wave& wave, const Sequence& seq, int64_t head_kv, int64_t packed, int64_t key,
                         int64_t keys, KeyScratch& s) {
    const Coefficient& gate = p_.epilogue.gate;
    float* row = s.rows.grad.get();
    for (int64_t n = larger(seq.diagonal - key, 0); n < keys; ++n) {
      const int64_t i = key + n - seq.diagonal, t = seq.q_start + i;
      if (i >= seq.tq) return;
      float* dv = s.dv.get() + n * columns_v();
      float to_value = 0.0f;
      for (int64_t j = 0; j < p_.group; ++j) {
        const int64_t at = i * p_.group + j, r = at % kGradRows, head = head_kv * p_.group + j;
        const RowPack pack = rows_.at(wave, packed + at / kGradRows);
        const T* grad = in_.grad_out.row<const T>(seq.batch, t, head);
        if (gate.uniform_in_row()) {
          add_row(pack.to_grad[r], grad, p_.dim_v, dv);
        } else {
          widen_row(grad, p_.dim_v, row);
          gate_channels(gate, gate.row(seq.batch, t, head), p_.dim_v, s.rows.gate.get(), row);
          add_row(pack.to_grad[r], row, p_.dim_v, dv);
        }
        add_row(pack.to_kept[r], in_.out.row<const T>(seq.batch, t, head), p_.dim_v, dv);
        to_value += pack.to_value[r];
      }
      T* mixed = reinterpret_cast<T*>(s.mixed.get());
      add_row(to_value, s.mix.get(seq.batch, seq.k_start + key + n, head_kv, mixed), p_.dim_v, dv);
    }
  }

  // One key: dK = scale dS^T Q, and dV' shared out as dV = lambda_v dV', dV1 = lambda_first dV'.
  void write_key(const Sequence& seq, int64_t head, int64_t key, int64_t n, KeyScratch& s) {
    const int64_t t = seq.k_start + key;
    if (out_.dk.data)
      scale_row(s.dk.get() + n * columns_k(), p_.scale, p_.dim_k, out_.dk.row<T>(seq.batch, t, head));
    float* dv = s.dv.get() + n * columns_v();
    if (in_.grad_mixed.data) {
      const T* extra = in_.grad_mixed.row<const T>(seq.batch, t, head);
      for (int64_t d = 0; d < p_.dim_v; ++d) dv[d] += to_float(extra[d]);
    }
    const int64_t row = (seq.batch * p_.keys_total + t) * p_.heads_kv + head;
    write_value(p_.lambda_v, p_.v, out_.dv, out_.lambda_v_partial, out_.lambda_v, seq.batch, t, head, row,
                dv);
    write_value(p_.lambda_first, p_.v_first, out_.dv_first, out_.lambda_first_partial, out_.lambda_first,
                seq.batch, t, head, row, dv);
  }

  void write_value(const Coefficient& c, const View& value, const View& grad, Partial kind, float* partial,
                   int64_t b, int64_t t, int64_t h, int64_t row, const float* dv) {
    if (grad.data) {
      T* out = grad.row<T>(b, t, h);
      if (!p_.mixes()) {
        scale_row(dv, 1.0f, p_.dim_v, out);
      } else if (c.uniform_in_row()) {
        scale_row(dv, c.at(b, t, h, 0), p_.dim_v, out);
      } else {
        for (int64_t d = 0; d < p_.dim_v; ++d) out[d] = from_float<T>(c.at(b, t, h, d) * dv[d]);
      }
    }
    if (kind == Partial::none || kind == Partial::column) return;
    const T* v = value.row<const T>(b, t, h);
    if (kind == Partial::row) {
      partial[row] = dot_rows(dv, v, p_.dim_v);
    } else {
      for (int64_t d = 0; d < p_.dim_v; ++d) partial[row * p_.dim_v + d] = dv[d] * to_float(v[d]);
    }
  }

  // dlambda per channel: the sum over this tile's keys; the op boundary adds the tiles up.
  void write_column(const Sequence& seq, int64_t head, int64_t key, int64_t keys, const View& value,
                    float* partial, KeyScratch& s) {
    float* out = partial + ((seq.column_start + key / kGradKeys) * p_.heads_kv + head) * p_.dim_v;
    for (int64_t d = 0; d < p_.dim_v; ++d) out[d] = 0.0f;
    for (int64_t n = 0; n < keys; ++n) {
      const T* v = value.row<const T>(seq.batch, seq.k_start + key + n, head);
      const float* dv = s.dv.get() + n * columns_v();
      for (int64_t d = 0; d < p_.dim_v; ++d) out[d] += dv[d] * to_float(v[d]);
    }
  }

  void write_dq(const Wave& wave, int64_t unit) {
    if (!out_.dq.data) return;
    const RowTile rows = wave.row_tile(unit);
    const Sequence& seq = *rows.sequence;
    const float* sums = dq_tile(wave, wave.packed_rows(rows));
    for (int64_t r = 0; r < rows.count; ++r) {
      scale_row(sums + r * columns_k(), p_.scale, p_.dim_k,
                out_.dq.row<T>(seq.batch, seq.q_start + rows.query(r), rows.head(r)));
    }
  }

  const Problem& p_;
  const BackwardInput& in_;
  const BackwardOutput& out_;
  const GradRows<T, Dot, precision> rows_;
};

}  // namespace resformer::RESFORMER_ISA

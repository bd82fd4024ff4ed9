// Backward's operands by rows: Q and dO as the products read them, and the numbers of each row that turn
// scores into probabilities and their gradients.
#pragma once

#include "attention/pack.h"
#include "attention/waves.h"
#include "common/epilogue_rows.h"

namespace resformer::RESFORMER_ISA {

// A packed row tile: Q and dO as rows of words, the same interleaved in pairs of rows (bfloat16 products
// only, where the summed axis runs over rows), the LSE in the unit of scores as lse + rest, and delta. Where
// something is excluded, dO is the gradient of the softmax's output y, and what the row adds to the gradient
// of the value at its own position is to_grad * dO (gated where the gate is one of channels) + to_kept * out
// + to_value * value.
struct RowPack {
  float *q, *grad, *q_pairs, *grad_pairs, *lse, *rest, *delta, *to_grad, *to_kept, *to_value;
};

template <class A, class B>
static inline float dot_rows(const A* a, const B* b, int64_t dim) {
  Vec sum = zero();
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) sum = fma(load(a + d), load(b + d), sum);
  float total = reduce_add(sum);
  for (; d < dim; ++d) total += to_float(a[d]) * to_float(b[d]);
  return total;
}

// `count` keys of K, from t on, as rows of words from row r of `k` on and as columns of the packed `k_t`.
template <class Dot, class T>
static inline void pack_key_rows(const View& keys, int64_t batch, int64_t t, int64_t head, int64_t dim,
                                 int64_t count, int64_t r, int64_t padded, float* k, float* k_t) {
  const int64_t words = row_words<Dot>(dim);
  for (int64_t i = 0; i < count; ++i) {
    pack_row<Dot>(keys.row<const T>(batch, t + i, head), dim, k + (r + i) * words);
  }
  pack_transposed(k + r * words, words, count, words, r, padded, k_t);
}

template <class T, class Dot, Precision precision>
class GradRows {
 public:
  GradRows(const Problem& p, const BackwardInput& in, const BackwardOutput& out)
      : p_(p), in_(in), out_(out) {}

  int64_t tile_words() const {
    const int64_t pairs = kPairs ? kGradRows / 2 * (columns_k() + columns_v()) : 0;
    return kGradRows * (words_k() + words_v() + (p_.epilogue.excludes ? 6 : 3)) + pairs;
  }

  RowPack at(const Wave& wave, int64_t tile) const {
    float* q = wave.packed + tile * tile_words();
    float* grad = q + kGradRows * words_k();
    float* q_pairs = grad + kGradRows * words_v();
    float* grad_pairs = q_pairs + (kPairs ? kGradRows / 2 * columns_k() : 0);
    float* lse = grad_pairs + (kPairs ? kGradRows / 2 * columns_v() : 0);
    float* rest = lse + kGradRows;
    float* delta = rest + kGradRows;
    float* own = delta + kGradRows;
    return {q, grad, q_pairs, grad_pairs, lse, rest, delta, own, own + kGradRows, own + 2 * kGradRows};
  }

  struct RowScratch {
    explicit RowScratch(const Problem& p)
        : grad(round_up(p.dim_v, kLanes)),
          kept(round_up(p.dim_v, kLanes)),
          gate(round_up(p.dim_v, kLanes)),
          mixed(round_up(p.dim_v, kLanes)),
          own(p.dim_v),
          mix(p) {}
    typename Dot::Session session;
    Scratch grad, kept, gate, mixed;
    OwnValue own;
    ValueRow mix;
  };

  void pack(const Wave& wave, int64_t unit, RowScratch& s) const {
    const RowTile rows = wave.row_tile(unit);
    s.own.reset();
    const Sequence& seq = *rows.sequence;
    const RowPack pack = at(wave, wave.packed_rows(rows));
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t t = seq.q_start + rows.query(r), head = rows.head(r);
      const T* grad = in_.grad_out.row<const T>(seq.batch, t, head);
      pack_row<Dot>(p_.q.row<const T>(seq.batch, t, head), p_.dim_k, pack.q + r * words_k());
      const float lse = in_.lse[lse_at(rows, r)] * Scores<precision>::kUnit;
      pack.lse[r] = lse == kMinusInf ? 0.0f : lse;
      pack.rest[r] = 0.0f;
      if (p_.epilogue.any()) {
        pack.delta[r] = pack_gated(rows, r, t, head, pack, s);
      } else {
        pack_row<Dot>(grad, p_.dim_v, pack.grad + r * words_v());
        pack.delta[r] = dot_rows(grad, in_.out.row<const T>(seq.batch, t, head), p_.dim_v);
      }
      pack.delta[r] -= in_.grad_lse_at(seq.batch, head, t);
    }
    if (p_.bias.kind == Bias::Kind::additive) split_lse(rows, pack);
    if (out_.sinks) write_sinks(rows, pack);
    if constexpr (kPairs) {
      for (int64_t r = 0; r < rows.count; r += 2) {
        const bool last = r + 1 == rows.count;
        interleave_words(pack.q, words_k(), r, last, columns_k(), pack.q_pairs);
        interleave_words(pack.grad, words_v(), r, last, columns_v(), pack.grad_pairs);
      }
    }
  }

 private:
  static constexpr bool kPairs = Dot::kPack == 2;
  // From here on an LSE's rounding, |LSE| / 2^24 of every probability of its row, is more than that of T.
  static constexpr float kCoarse = sizeof(T) == 4 ? 1024.0f : 8192.0f;

  int64_t columns_k() const { return round_up(p_.dim_k, kLanes); }
  int64_t columns_v() const { return round_up(p_.dim_v, kLanes); }
  int64_t words_k() const { return row_words<Dot>(p_.dim_k); }
  int64_t words_v() const { return row_words<Dot>(p_.dim_v); }

  int64_t lse_at(const RowTile& rows, int64_t r) const {
    const int64_t t = rows.sequence->q_start + rows.query(r);
    return rows.sequence->batch * in_.lse_stride[0] + rows.head(r) * in_.lse_stride[1] +
           t * in_.lse_stride[2];
  }

  // Packs the gradient of y in place of dO: see attention/epilogue.py for the equations and names. Returns
  // y.dy.
  float pack_gated(const RowTile& rows, int64_t r, int64_t t, int64_t head, const RowPack& pack,
                   RowScratch& s) const {
    const Epilogue& e = p_.epilogue;
    const int64_t b = rows.sequence->batch, at = p_.query_row(b, t, head);
    float *grad = s.grad.get(), *kept = s.kept.get();
    widen_row(in_.grad_out.row<const T>(b, t, head), p_.dim_v, grad);
    widen_row(in_.out.row<const T>(b, t, head), p_.dim_v, kept);
    if (e.excludes) read_own(rows, t - rows.sequence->q_start, s);
    Dots dots = project(s);
    float gate = 1.0f;
    if (e.gate.uniform_in_row()) {
      gate = e.gate.at(b, t, head, 0);
      if (out_.gate) out_.gate[at] = dots.kept;
    } else {
      if (out_.gate)
        for (int64_t d = 0; d < p_.dim_v; ++d) out_.gate[at * p_.dim_v + d] = grad[d] * kept[d];
      gate_channels(e.gate, e.gate.row(b, t, head), p_.dim_v, s.gate.get(), grad);
      if (in_.ungated) dots = project(s);
    }
    const float seen = in_.ungated ? gate : 1.0f;  // t of the equations is this times the gradient here
    float to_own = 0.0f;
    if (e.excludes) {
      const float a = in_.along[lse_at(rows, r)], x = e.exclusive.at(b, t, head, 0), c = gate * dots.own;
      const float part = x / s.own.size();
      if (out_.exclusive) out_.exclusive[at] = -a * c;
      pack.to_grad[r] = -x * a * gate;
      pack.to_kept[r] = -part * seen * dots.own;
      pack.to_value[r] = -part * c * a * (x - (s.own.above() ? 2.0f : 0.0f));
      to_own = -part * c;
    }
    float* packed = pack.grad + r * words_v();
    float* dy = Dot::kPack == 2 ? grad : packed;
    for (int64_t d = 0; d < p_.dim_v; d += kLanes) {
      const Vec gated = mul(set1(gate), load(grad + d));
      store(dy + d, e.excludes ? fma(set1(to_own), load(s.own.w() + d), gated) : gated);
    }
    if constexpr (Dot::kPack == 2) {
      T* rounded = reinterpret_cast<T*>(s.gate.get());
      scale_row(dy, 1.0f, p_.dim_v, rounded);
      pack_row<Dot>(rounded, p_.dim_v, packed);
    }
    return seen * dots.kept;
  }

  struct Dots {
    float kept, own;
  };

  // The gradient's dots with what forward kept and with the value at the own position.
  Dots project(const RowScratch& s) const {
    Vec kept = zero(), own = zero();
    for (int64_t d = 0; d < p_.dim_v; d += kLanes) {
      const Vec grad = load(s.grad.get() + d);
      kept = fma(grad, load(s.kept.get() + d), kept);
      if (p_.epilogue.excludes) own = fma(grad, load(s.own.w() + d), own);
    }
    return {reduce_add(kept), p_.epilogue.excludes ? reduce_add(own) : 0.0f};
  }

  void read_own(const RowTile& rows, int64_t i, RowScratch& s) const {
    const Sequence& seq = *rows.sequence;
    s.own.at(i, p_.epilogue.least, [&](float* w) -> const float* {
      const int64_t key = i + seq.diagonal;
      if (key < 0) return nullptr;
      T* into = reinterpret_cast<T*>(s.mixed.get());
      widen_row(s.mix.get(seq.batch, seq.k_start + key, rows.head_kv, into), p_.dim_v, w);
      return w;
    });
  }

  // A row that a bias masks whole with a large finite number has an LSE in which float32 has no room for the
  // log of the softmax's sum. Its maximum and sum are computed again: LSE = lse + rest.
  void split_lse(const RowTile& rows, const RowPack& pack) const {
    bool coarse[kGradRows], any = false;
    RowState state[kGradRows];
    for (int64_t r = 0; r < rows.count; ++r) {
      const float size = __builtin_fabsf(pack.lse[r]);
      coarse[r] = size > kCoarse && size < -kMinusInf;
      any = any || coarse[r];
      state[r].m = kMinusInf;
      store(state[r].l, zero());
    }
    if (!any) return;
    const Sequence& seq = *rows.sequence;
    const Scratch k(kGradKeys * words_k()), k_t(kGradKeys * words_k()), scores(kGradRows * kGradKeys),
        bias(kGradKeys);
    Bounds bounds;
    bounds.read(rows);
    Span spans[(kGradRows + kTileRows - 1) / kTileRows];
    for (int64_t key = bounds.lo[0] / kGradKeys * kGradKeys; key < bounds.hi[rows.count - 1];
         key += kGradKeys) {
      const int64_t keys = smaller(kGradKeys, seq.tk - key), padded = lane_ceil(keys);
      for (int64_t r = 0; r < padded; r += kLanes) {
        pack_key_rows<Dot, T>(p_.k, seq.batch, seq.k_start + key + r, rows.head_kv, p_.dim_k,
                              smaller(kLanes, keys - r), r, padded, k.get(), k_t.get());
      }
      block_spans(bounds, rows.count, key, keys, spans);
      gemm_scores<Dot>(pack.q, words_k(), packed_panels(k_t.get(), words_k(), padded),
                       (p_.dim_k + Dot::kPack - 1) / Dot::kPack, rows.count, spans,
                       score_alpha<precision>(p_), scores.get(), kGradKeys);
      for (int64_t r = 0; r < rows.count; ++r) {
        const Span span = spans[r / kTileRows];
        if (!coarse[r] || span.lo >= span.hi) continue;
        const int64_t from = lane_floor(span.lo), to = lane_ceil(span.hi);
        float* s = scores.get() + r * kGradKeys;
        transform_row<precision>(rows, r, key, keys, from, to, bias.get(), s, nullptr);
        softmax_rows<Dot, precision, 1>(s, 0, from, to, bounds.lo + r, bounds.hi + r, key, state + r, nullptr,
                                        0);
      }
    }
    for (int64_t r = 0; r < rows.count; ++r) {
      if (!coarse[r]) continue;
      double top = state[r].m, sum = reduce_add(load(state[r].l));
      if (p_.sinks) {
        const double sink = p_.sinks[rows.head(r)], m = top;
        top = sink > m ? sink : m;
        sum = sum * __builtin_exp(m - top) + __builtin_exp(sink - top);
      }
      pack.lse[r] = static_cast<float>(top);
      pack.rest[r] = static_cast<float>(__builtin_log(sum));
    }
  }

  // The sink is a column of scores with no value: dP = 0, so dS = -P delta.
  void write_sinks(const RowTile& rows, const RowPack& pack) const {
    for (int64_t r = 0; r < rows.count; ++r) {
      const int64_t at = lse_at(rows, r);
      const float lse = pack.rest[r] == 0.0f ? in_.lse[at] : pack.lse[r];
      const double gap = static_cast<double>(p_.sinks[rows.head(r)]) - lse - pack.rest[r];
      out_.sinks[at] = lse == kMinusInf ? 0.0f : -static_cast<float>(__builtin_exp(gap)) * pack.delta[r];
    }
  }

  const Problem& p_;
  const BackwardInput& in_;
  const BackwardOutput& out_;
};

}  // namespace resformer::RESFORMER_ISA

// The rows of a unit among the queries, and how their sums become the result.
#pragma once

#include "common/epilogue_rows.h"
#include "common/softmax.h"
#include "kvcache/kvcache.h"
#include "kvcache/plan.h"

namespace resformer::RESFORMER_ISA {

// Maximum of a row's scores, and the sum of their exponentials below it.
struct RowSum {
  float m, l;
};

// Each split is a softmax over its own keys: a row of `columns` sums, its maximum and its sum of
// exponentials, the next split's `stride` floats on. Weights of exp(its maximum - the highest) combine them,
// in order, into `acc`.
template <class Unit>
static RowSum merge_splits(const float* first, int64_t splits, int64_t stride, int64_t columns, float* acc) {
  RowSum sum{kMinusInf, 0.0f};
  for (int64_t i = 0; i < splits; ++i) {
    const float m = first[i * stride + columns];
    sum.m = m > sum.m ? m : sum.m;
  }
  memset(acc, 0, columns * sizeof(float));
  for (int64_t i = 0; i < splits; ++i) {
    const float* row = first + i * stride;
    const float m = row[columns], l = row[columns + 1];
    if (l == 0.0f) continue;
    // No maximum: the split saw NaN, which must propagate.
    const float weight = m == kMinusInf ? 1.0f : Unit::exp(m - sum.m);
    sum.l += weight * l;
    for (int64_t d = 0; d < columns; d += kLanes)
      store(acc + d, fma(set1(weight), load(row + d), load(acc + d)));
  }
  return sum;
}

// T: dtype of q and out. C: elements of the cache.
template <class T, class C>
class CacheResult {
 public:
  explicit CacheResult(const CacheProblem& p) : p_(p) {}

  // What a thread keeps for the epilogue.
  struct Rows {
    explicit Rows(const CacheProblem& p)
        : gate(p.epilogue.gates ? round_up(p.values.dim, kLanes) : 0),
          own(p.epilogue.excludes ? p.values.dim : 0) {}
    Scratch gate;
    OwnValue own;
  };

  int64_t query(const CacheGroup& g, int64_t row) const { return (g.row + row) / p_.group; }
  int64_t time(const CacheGroup& g, int64_t query) const {
    return p_.sequences[g.sequence].queries.first + query;
  }
  int64_t head(const CacheGroup& g, int64_t h, int64_t row) const {
    return (g.head + h) * p_.group + (g.row + row) % p_.group;
  }

  // Writes out and LSE of a row whose keys have all been seen. Rows of a head come in order, after `rows.own`
  // was reset.
  void finish(const CacheGroup& g, int64_t h, int64_t r, float m, float l, float* acc, Rows& rows) const {
    const int64_t head_q = head(g, h, r), t = time(g, query(g, r)), dim = p_.values.dim;
    const auto [factor, lse] = close_row<Unit>(m, l, p_.sinks ? p_.sinks + head_q : nullptr, p_.lse);
    T* out = p_.out.row<T>(g.sequence, t, head_q);
    if (!p_.epilogue.any()) {
      scale_row(acc, factor, dim, out);
    } else {
      if (p_.epilogue.excludes) read_own(g, g.head + h, query(g, r), rows.own);
      finish_row<T>(p_.epilogue, rows.own, g.sequence, t, head_q, dim, factor, rows.gate.get(), acc, nullptr,
                    out);
    }
    if (p_.lse) p_.lse[g.sequence * p_.lse_stride[0] + head_q * p_.lse_stride[1] + t] = lse;
  }

 private:
  using Unit = Scores<sizeof(T) == 4 ? Precision::full : Precision::half>;

  // The cached value at query i's own position. Where a mask hides it, memory may hold NaN.
  void read_own(const CacheGroup& g, int64_t head, int64_t i, OwnValue& own) const {
    own.at(i, p_.epilogue.least, [&](float* w) -> const float* {
      const CacheSequence& s = p_.sequences[g.sequence];
      const int64_t key = i + s.length - s.queries.count;
      if (key < s.first || key >= s.last) return nullptr;
      if (p_.mask && !p_.mask[g.sequence * p_.mask_stride[0] + key * p_.mask_stride[1]]) return nullptr;
      const CacheRow place = p_.values.table.place(g.sequence, key);
      widen_row(p_.values.cache.row<const C>(place.row, place.at, head), p_.values.dim, w);
      if (p_.values.scale) {
        const int64_t* stride = p_.values.scale_stride;
        const Vec scale =
            set1(p_.values.scale[place.row * stride[0] + place.at * stride[1] + head * stride[2]]);
        for (int64_t d = 0; d < p_.values.dim; d += kLanes) store(w + d, mul(load(w + d), scale));
      }
      return w;
    });
  }

  const CacheProblem& p_;
};

}  // namespace resformer::RESFORMER_ISA

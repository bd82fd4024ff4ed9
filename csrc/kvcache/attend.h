// Attention over a cache. A unit is one split of a group's keys; it walks them block by block, all its heads
// within a block, so that memory is read in order and each row of K and V once. See kvcache/README.md.
#pragma once

#include <atomic>
#include <type_traits>

#include "common/parallel.h"
#include "common/rows.h"
#include "common/softmax.h"
#include "kvcache/block.h"
#include "kvcache/tile.h"

namespace resformer::RESFORMER_ISA {

// T: of q and out. M: how the cache's rows are multiplied.
template <class T, class M>
class CacheAttend {
 public:
  explicit CacheAttend(const CacheProblem& p) : p_(p), plan_(p, sizeof(C)) {}

  void run() {
    const int64_t groups = static_cast<int64_t>(plan_.groups().size());
    const Scratch partial(plan_.partial_floats());
    std::vector<std::atomic<int64_t>> done(groups);
    parallel_units(
        plan_.units(), [&] { return Own(p_, plan_); },
        [&](int64_t unit, Own& own) {
          const int64_t index = plan_.group_of(unit);
          const CacheGroup& g = plan_.groups()[index];
          attend(g, unit - g.first_unit, own);
          if (g.splits == 1) return finish_all(g, own);
          hand_on(g, unit - g.first_unit, own, partial.get() + g.first_partial);
          // Whoever is last merges, in the order of the splits.
          if (done[index].fetch_add(1, std::memory_order_acq_rel) + 1 == g.splits)
            merge(g, partial.get() + g.first_partial, own);
        });
  }

 private:
  using C = typename M::C;
  using Dot = typename M::Dot;
  static constexpr Precision kPrecision = sizeof(T) == 4 ? Precision::full : Precision::half;
  using Unit = Scores<kPrecision>;
  static constexpr bool kCodes = sizeof(C) == 1;

  // Rows go through the tiles by fours, the last two or one by themselves; three are four, one of them idle.
  static int64_t padded(int64_t rows) { return rows % 4 == 3 ? rows + 1 : rows; }
  template <class Body>
  static void by_fours(int64_t rows, const Body& body) {
    int64_t r = 0;
    for (; rows - r > 2; r += 4) body(r, std::integral_constant<int, 4>());
    if (rows - r == 2) body(r, std::integral_constant<int, 2>());
    if (rows - r == 1) body(r, std::integral_constant<int, 1>());
  }

  struct Own {
    Own(const CacheProblem& p, const CachePlan& plan)
        : rows(plan.most_heads() * padded(plan.most_rows())),
          q(rows * row_words<Dot>(p.keys.dim)),
          acc(rows * plan.columns()),
          scores(padded(plan.most_rows()) * kMostTokens),
          scales(kMostTokens),
          zeros(p.values.dim),
          states(rows * sizeof(RowState) / sizeof(float)) {
      memset(zeros.get(), 0, p.values.dim * sizeof(float));
      state = reinterpret_cast<RowState*>(states.get());
    }
    int64_t rows;
    Scratch q, acc, scores, scales, zeros, states;
    RowState* state;
    Block<C> blocks[2];
    // The keys that each row of the unit may see: positions, and within a block.
    int64_t from[kUnitRows + 1], to[kUnitRows + 1], lo[kUnitRows + 1], hi[kUnitRows + 1];
  };

  int64_t words() const { return row_words<Dot>(p_.keys.dim); }
  int64_t query(const CacheGroup& g, int64_t row) const { return (g.row + row) / p_.group; }
  int64_t head(const CacheGroup& g, int64_t h, int64_t row) const {
    return (g.head + h) * p_.group + (g.row + row) % p_.group;
  }
  float* acc_of(const CacheGroup& g, int64_t h, const Own& own) const {
    return own.acc.get() + h * padded(g.rows) * plan_.columns();
  }
  float* q_of(const CacheGroup& g, int64_t h, const Own& own) const {
    return own.q.get() + h * padded(g.rows) * words();
  }

  void start(const CacheGroup& g, Own& own) const {
    const int64_t rows = padded(g.rows);
    for (int64_t h = 0; h < g.heads; ++h) {
      for (int64_t r = 0; r < rows; ++r) {
        RowState& state = own.state[h * rows + r];
        state.m = kMinusInf;
        store(state.l, zero());
        float* q = q_of(g, h, own) + r * words();
        if (r < g.rows) {
          pack_row<Dot>(p_.q.row<T>(g.sequence, query(g, r), head(g, h, r)), p_.keys.dim, q);
        } else {
          memset(q, 0, words() * sizeof(float));
        }
      }
    }
    memset(own.acc.get(), 0, g.heads * rows * plan_.columns() * sizeof(float));
    const CacheSequence& s = p_.sequences[g.sequence];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = query(g, smaller(r, g.rows - 1));
      own.from[r] = p_.key_lo(s, i);
      own.to[r] = p_.key_hi(s, i);
    }
  }

  void attend(const CacheGroup& g, int64_t split, Own& own) const {
    start(g, own);
    const int64_t tokens = plan_.tokens(), first = plan_.first(g), last = plan_.last(g);
    const int64_t blocks = (last - first + tokens - 1) / tokens;
    const int64_t begin = first + blocks * split / g.splits * tokens,
                  end = smaller(first + blocks * (split + 1) / g.splits * tokens, last);
    Block<C>*now = &own.blocks[0], *next = &own.blocks[1];
    now->fill(p_, g.sequence, begin, end, tokens);
    while (now->count > 0) {
      next->fill(p_, g.sequence, now->end, end, tokens);
      attend_block(g, *now, *next, own);
      Block<C>* other = now;
      now = next;
      next = other;
    }
  }

  void attend_block(const CacheGroup& g, Block<C>& block, const Block<C>& next, Own& own) const {
    block.pad();
    for (int64_t r = 0; r < padded(g.rows); ++r) {
      own.lo[r] = block.before(own.from[r]);
      own.hi[r] = block.before(own.to[r]);
    }
    Ahead<C> keys(next.keys, next.count, g.head, g.heads, p_.keys.cache.stride[2], p_.keys.dim);
    Ahead<C> values(next.values, next.count, g.head, g.heads, p_.values.cache.stride[2], p_.values.dim);
    for (int64_t h = 0; h < g.heads; ++h) {
      scores(g, h, block, keys, own);
      if constexpr (kCodes)
        gather(block.value_scales, block.count, p_.values.scale_stride[2] * (g.head + h), own);
      by_fours(padded(g.rows), [&](int64_t r, auto count) { weigh<count()>(g, h, r, block, values, own); });
    }
  }

  // The columns that any of R rows from r on may see, in whole vectors.
  template <int R>
  static bool span(const Own& own, int64_t r, int64_t* from, int64_t* to) {
    *from = lane_floor(own.lo[r]);
    *to = lane_ceil(own.hi[r + R - 1]);
    return own.lo[r] < own.hi[r + R - 1];
  }

  void gather(const float* const* scales, int64_t count, int64_t offset, Own& own) const {
    for (int64_t t = 0; t < count; ++t) own.scales.get()[t] = scales[t][offset];
    for (int64_t t = count; t < lane_ceil(count); ++t) own.scales.get()[t] = 0.0f;
  }

  // Scores of all rows, scaled and capped, in the unit of the softmax.
  void scores(const CacheGroup& g, int64_t h, const Block<C>& block, Ahead<C>& ahead, Own& own) const {
    const int64_t offset = (g.head + h) * p_.keys.cache.stride[2];
    const bool transformed = kCodes || p_.softcap > 0.0f;
    const float alpha = transformed ? p_.scale : p_.scale * Unit::kUnit;
    if constexpr (kCodes) gather(block.key_scales, block.count, p_.keys.scale_stride[2] * (g.head + h), own);
    by_fours(padded(g.rows), [&](int64_t r, auto count) {
      constexpr int R = count(), kTokens = kSums / R;
      int64_t from, to;
      if (!span<R>(own, r, &from, &to)) return;
      float* s = own.scores.get() + r * kMostTokens;
      for (int64_t t = from / kTokens * kTokens; t < to; t += kTokens) {
        score_tile<M, R>(q_of(g, h, own) + r * words(), words(), block.keys + t, offset, p_.keys.dim, alpha,
                         s + t, kMostTokens);
        if (r == 0) ahead.fetch(kTokens);
      }
      if (!transformed) return;
      for (int64_t i = 0; i < R; ++i, s += kMostTokens) {
        for (int64_t t = from; t < to; t += kLanes) {
          Vec x = load(s + t);
          if constexpr (kCodes) x = mul(x, load(own.scales.get() + t));
          if (p_.softcap > 0.0f) x = mul(tanh(mul(x, set1(1.0f / p_.softcap)), nullptr), set1(p_.softcap));
          store(s + t, mul(x, set1(Unit::kUnit)));
        }
      }
    });
  }

  // The softmax of R rows, and their share of P V.
  template <int R>
  void weigh(const CacheGroup& g, int64_t h, int64_t r, const Block<C>& block, Ahead<C>& ahead,
             Own& own) const {
    int64_t from, to;
    if (!span<R>(own, r, &from, &to)) return;
    float *s = own.scores.get() + r * kMostTokens, *acc = acc_of(g, h, own) + r * plan_.columns();
    softmax_rows<Dot, kPrecision, R>(s, kMostTokens, from, to, own.lo + r, own.hi + r, 0,
                                     own.state + h * padded(g.rows) + r, acc, plan_.columns());
    if constexpr (kCodes) {
      for (int64_t i = 0; i < R; ++i) {
        float* p = s + i * kMostTokens;
        for (int64_t t = from; t < to; t += kLanes)
          store(p + t, mul(load(p + t), load(own.scales.get() + t)));
      }
    }
    const int64_t end = smaller(to, block.count);
    if constexpr (Dot::kPack == 2) {
      const int64_t whole = (end - from) / 2 * 2;
      multiply<R>(s + from / 2, block.values + from, (g.head + h) * p_.values.cache.stride[2], whole, acc,
                  r == 0 ? &ahead : nullptr);
      if (whole == end - from) return;
      const C* last[2] = {block.values[end - 1] + (g.head + h) * p_.values.cache.stride[2],
                          reinterpret_cast<const C*>(own.zeros.get())};
      multiply<R>(s + (end - 1) / 2, last, 0, 2, acc, nullptr);
    } else {
      multiply<R>(s + from, block.values + from, (g.head + h) * p_.values.cache.stride[2], end - from, acc,
                  r == 0 ? &ahead : nullptr);
    }
  }

  template <int R>
  void multiply(const float* p, const C* const* values, int64_t offset, int64_t tokens, float* acc,
                Ahead<C>* ahead) const {
    constexpr int kMost = kTileVecs == 4 ? (R == 4 ? 4 : 8) : (R == 4 ? 2 : 4), kLeast = M::kStep / kLanes;
    const auto fetch = [&](int64_t rows) {
      if (ahead) ahead->fetch(rows);
    };
    const int64_t dim = p_.values.dim, columns = plan_.columns();
    int64_t d = 0;
    for (; d + kMost * kLanes <= dim; d += kMost * kLanes) {
      value_tile<M, R, kMost>(p, kMostTokens, values, offset + d, tokens, 0, acc + d, columns, fetch);
      ahead = nullptr;
    }
    for (; d + M::kStep <= dim; d += M::kStep)
      value_tile<M, R, kLeast>(p, kMostTokens, values, offset + d, tokens, 0, acc + d, columns, fetch);
    if (d < dim)
      value_tile<M, R, kLeast>(p, kMostTokens, values, offset + d, tokens, dim - d, acc + d, columns, fetch);
  }

  float* partial_of(const CacheGroup& g, int64_t split, int64_t h, int64_t r, float* partial) const {
    return partial + ((split * g.heads + h) * g.rows + r) * plan_.partial_row();
  }

  void hand_on(const CacheGroup& g, int64_t split, const Own& own, float* partial) const {
    const int64_t columns = plan_.columns();
    for (int64_t h = 0; h < g.heads; ++h) {
      for (int64_t r = 0; r < g.rows; ++r) {
        float* out = partial_of(g, split, h, r, partial);
        const RowState& state = own.state[h * padded(g.rows) + r];
        memcpy(out, acc_of(g, h, own) + r * columns, columns * sizeof(float));
        out[columns] = state.m;
        out[columns + 1] = reduce_add(load(state.l));
      }
    }
  }

  void finish_all(const CacheGroup& g, const Own& own) const {
    for (int64_t h = 0; h < g.heads; ++h) {
      for (int64_t r = 0; r < g.rows; ++r) {
        const RowState& state = own.state[h * padded(g.rows) + r];
        finish(g, h, r, state.m, reduce_add(load(state.l)), acc_of(g, h, own) + r * plan_.columns());
      }
    }
  }

  // Each split is a softmax over its own keys; weighted by exp of its maximum they are one over all.
  void merge(const CacheGroup& g, float* partial, Own& own) const {
    const int64_t columns = plan_.columns();
    float* acc = own.acc.get();
    for (int64_t h = 0; h < g.heads; ++h) {
      for (int64_t r = 0; r < g.rows; ++r) {
        float m = kMinusInf, l = 0.0f;
        for (int64_t i = 0; i < g.splits; ++i) {
          const float own_m = partial_of(g, i, h, r, partial)[columns];
          m = own_m > m ? own_m : m;
        }
        memset(acc, 0, columns * sizeof(float));
        for (int64_t i = 0; i < g.splits; ++i) {
          const float* row = partial_of(g, i, h, r, partial);
          const float own_m = row[columns], own_l = row[columns + 1];
          // Without a maximum: no key was seen, or NaN was and must pass.
          const float weight = own_m == kMinusInf ? (own_l == 0.0f ? 0.0f : 1.0f) : Unit::exp(own_m - m);
          if (own_l == 0.0f) continue;
          l += weight * own_l;
          for (int64_t d = 0; d < columns; d += kLanes)
            store(acc + d, fma(set1(weight), load(row + d), load(acc + d)));
        }
        finish(g, h, r, m, l, acc);
      }
    }
  }

  // Adds the sink, divides by the softmax's denominator and writes out and LSE. A row that saw no key gives
  // zeros.
  void finish(const CacheGroup& g, int64_t h, int64_t r, float m, float l, const float* acc) const {
    const int64_t head_q = head(g, h, r), i = query(g, r);
    float weight = 1.0f;
    if (p_.sinks) {
      const float sink = p_.sinks[head_q] * Unit::kUnit, top = sink > m ? sink : m;
      weight = m == kMinusInf ? 1.0f : Unit::exp(m - top);
      l = l * weight + (sink == kMinusInf ? 0.0f : Unit::exp(sink - top));
      m = top;
    }
    const bool empty = l == 0.0f;
    scale_row(acc, empty ? 0.0f : weight / l, p_.values.dim, p_.out.row<T>(g.sequence, i, head_q));
    if (p_.lse)
      p_.lse[(g.sequence * p_.heads_q + head_q) * p_.queries + i] = empty ? kMinusInf : Unit::lse(m, l);
  }

  const CacheProblem& p_;
  CachePlan plan_;
};

}  // namespace resformer::RESFORMER_ISA

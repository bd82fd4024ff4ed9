// Attention over a cache (split-KV). A unit is one split of a group's keys, processed block by block in the
// order of memory: each row of K and V is read once. See kvcache/README.md.
#pragma once

#include <atomic>
#include <utility>

#include "common/parallel.h"
#include "common/rows.h"
#include "common/softmax.h"
#include "kvcache/result.h"
#include "kvcache/scratch.h"
#include "kvcache/stream.h"

namespace resformer::RESFORMER_ISA {

// T: dtype of q and out. M: products with the cache's rows (tile.h).
template <class T, class M>
class CacheAttend {
 public:
  explicit CacheAttend(const CacheProblem& p) : p_(p), plan_(p, sizeof(C)), result_(p) {}

  void run() {
    const int64_t units = plan_.units(), threads = torch::stable::get_num_threads();
    const Scratch partial(plan_.partial_floats());
    std::vector<std::atomic<int64_t>> done(plan_.groups().size());
    std::atomic<int64_t> next{0};
    parallel_workers(smaller(units, threads), [&](int64_t) {
      int64_t unit = next.fetch_add(1, std::memory_order_relaxed);
      if (unit >= units) return;
      Own own(p_, plan_);
      while (unit < units) {
        // Taking the next unit now lets its first block be prefetched during the last block of this one.
        const int64_t following = next.fetch_add(1, std::memory_order_relaxed);
        const int64_t index = plan_.group_of(unit);
        const CacheGroup& g = plan_.groups()[index];
        attend(g, unit - g.first_unit, following, own);
        if (g.splits == 1) {
          finish_all(g, own);
        } else {
          store_partial(g, unit - g.first_unit, own, partial.get() + g.first_partial);
          // The thread that finishes last merges, in the order of the splits.
          if (done[index].fetch_add(1, std::memory_order_acq_rel) + 1 == g.splits)
            merge(g, partial.get() + g.first_partial, own);
        }
        unit = following;
      }
    });
  }

 private:
  using C = typename M::C;
  using Dot = typename M::Dot;
  static constexpr Precision kPrecision = sizeof(T) == 4 ? Precision::full : Precision::half;
  using Unit = Scores<kPrecision>;
  static constexpr bool kCodes = sizeof(C) == 1;

  using Own = WorkerScratch<T, C, Dot>;

  int64_t words() const { return row_words<Dot>(p_.keys.dim); }
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
        if (!g.tiling.streams) own.state[h * rows + r] = {kMinusInf, {}};
        float* q = q_of(g, h, own) + r * words();
        if (r < g.rows) {
          pack_row<Dot>(p_.q.row<T>(g.sequence, result_.time(g, result_.query(g, r)), result_.head(g, h, r)),
                        p_.keys.dim, q);
        } else {
          memset(q, 0, words() * sizeof(float));
        }
      }
    }
    if (g.tiling.streams) stream_state(g, own).reset(g.heads * rows);
    memset(own.acc.get(), 0, g.heads * rows * plan_.columns() * sizeof(float));
    const CacheSequence& s = p_.sequences[g.sequence];
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = result_.query(g, smaller(r, g.rows - 1));
      own.from[r] = p_.key_lo(s, i);
      own.to[r] = p_.key_hi(s, i);
    }
  }

  void attend(const CacheGroup& g, int64_t split, int64_t following, Own& own) const {
    start(g, own);
    attend_blocks(g, split, following, own);
    if (g.tiling.streams) stream_state(g, own).close();
  }

  void attend_blocks(const CacheGroup& g, int64_t split, int64_t following, Own& own) const {
    const CacheRange keys = plan_.keys_of(g, split);
    if (!own.filled) own.now->fill(p_, g.sequence, keys.begin, keys.end, g.tiling.tokens);
    own.filled = false;
    while (own.now->count > 0) {
      const CacheGroup* owner = &g;
      own.next->fill(p_, g.sequence, own.now->end, keys.end, g.tiling.tokens);
      if (own.next->count == 0 && following < plan_.units()) {
        owner = &plan_.groups()[plan_.group_of(following)];
        const CacheRange then = plan_.keys_of(*owner, following - owner->first_unit);
        own.next->fill(p_, owner->sequence, then.begin, then.end, owner->tiling.tokens);
        own.filled = true;
      }
      attend_block(g, *own.now, *own.next, *owner, own);
      std::swap(own.now, own.next);
      if (own.filled) return;
    }
  }

  void attend_block(const CacheGroup& g, const Block<C>& block, const Block<C>& next, const CacheGroup& owner,
                    Own& own) const {
    for (int64_t r = 0; r < padded(g.rows); ++r) {
      own.lo[r] = block.before(own.from[r]);
      own.hi[r] = block.before(own.to[r]);
    }
    const Following<C> then{next, owner.head - g.head, p_.alike()};
    switch (g.tiling.streams ? padded(g.rows) : 0) {
      case 1:
        return stream<1>(g, block, then, own);
      case 2:
        return stream<2>(g, block, then, own);
      case 4:
        return stream<4>(g, block, then, own);
      case 8:
        return stream<8>(g, block, then, own);
      default:
        return tiles(g, block, own);
    }
  }

  StreamState stream_state(const CacheGroup& g, const Own& own) const {
    return {own.stream_sums.get(), stream_width(g)};
  }
  static int64_t stream_width(const CacheGroup& g) { return round_up(g.heads * padded(g.rows), kSums); }

  // Few rows: all heads of a token, then the next token.
  template <int R>
  void stream(const CacheGroup& g, const Block<C>& block, const Following<C>& then, Own& own) const {
    const int64_t width = stream_width(g), from = lane_floor(own.lo[0]),
                  to = smaller(own.hi[R - 1], block.count);
    float* s = own.scores.get();
    stream_keys<R>(g, block, then, width, own);
    if (own.lo[0] >= own.hi[R - 1]) return;
    transform_stream<R>(g, block, s, width, from, to, own);
    mask_stream<R>(s, width, g.heads, from, to, own.lo, own.hi);
    softmax_stream<M, kPrecision>(s, width, g.heads * R, from, to, stream_state(g, own), own.acc.get(),
                                  plan_.columns());
    if constexpr (kCodes) scale_stream<R>(g, block.value_scales, p_.values, s, width, from, to, own);
    by_width<M>(p_.values.dim,
                [&](auto steps) { stream_block_values<R, steps()>(g, block, then, from, to, own); });
  }

  template <int R>
  void stream_keys(const CacheGroup& g, const Block<C>& block, const Following<C>& then, int64_t width,
                   Own& own) const {
    const int64_t stride = p_.keys.cache.stride[2];
    by_width<M>(p_.keys.dim, [&](auto steps) {
      for (int64_t t = 0; t < block.count; ++t) {
        stream_scores<M, R, steps()>(own.q.get(), words(), block.keys[t] + g.head * stride, stride, g.heads,
                                     p_.keys.dim, then.key(block, t, stride), alpha(),
                                     own.scores.get() + t * width);
      }
    });
  }

  template <int R, int W>
  void stream_block_values(const CacheGroup& g, const Block<C>& block, const Following<C>& then, int64_t from,
                           int64_t end, Own& own) const {
    const int64_t stride = p_.values.cache.stride[2], width = stream_width(g);
    const float* p = own.scores.get();
    int64_t t = from;
    const auto pass = [&](auto abreast) {
      constexpr int kRows = abreast() * Dot::kPack;
      for (; t + kRows <= end; t += kRows) {
        ValueRow<C> rows[kRows];
        for (int64_t i = 0; i < kRows; ++i)
          rows[i] = {block.values[t + i] + g.head * stride, then.value(block, t + i, stride)};
        stream_values<M, R, W, abreast()>(p + t / Dot::kPack * width, width, rows, stride, g.heads,
                                          p_.values.dim, own.acc.get(), plan_.columns());
      }
    };
    pass(std::integral_constant<int, kAbreast>());
    pass(std::integral_constant<int, 1>());
    if (t == end) return;
    // Half a pair: its other half is a row of zeros, because memory past the block may hold NaN.
    const ValueRow<C> zeros{reinterpret_cast<const C*>(own.zeros.get()), 0};
    for (int64_t h = 0; h < g.heads; ++h) {
      const ValueRow<C> pair[2] = {{block.values[t] + (g.head + h) * stride, 0}, zeros};
      stream_values<M, R, W, 1>(p + t / Dot::kPack * width + h * R, width, pair, 0, 1, p_.values.dim,
                                acc_of(g, h, own), plan_.columns());
    }
  }

  // Multiplies each row of a head by the head's scale of a quantised cache.
  template <int R>
  void scale_stream(const CacheGroup& g, const float* const* scales, const CacheSide& side, float* s,
                    int64_t width, int64_t from, int64_t to, Own& own) const {
    // All tokens first: a vector load from under narrower stores waits for memory.
    float* lanes = own.scales.get();
    for (int64_t t = from; t < to; ++t) {
      const float* scale = scales[t] + g.head * side.scale_stride[2];
      for (int64_t h = 0; h < g.heads; ++h) {
        for (int r = 0; r < R; ++r) lanes[t * width + h * R + r] = scale[h * side.scale_stride[2]];
      }
    }
    for (int64_t i = from * width; i < to * width; i += kLanes)
      store(s + i, mul(load(s + i), load(lanes + i)));
  }

  template <int R>
  void transform_stream(const CacheGroup& g, const Block<C>& block, float* s, int64_t width, int64_t from,
                        int64_t to, Own& own) const {
    if (!transformed()) return;
    if constexpr (kCodes) scale_stream<R>(g, block.key_scales, p_.keys, s, width, from, to, own);
    for (float* at = s + from * width; at < s + to * width; at += kLanes) store(at, to_unit(load(at)));
  }

  // Many rows: the products take most of the time, so transposing a head's keys pays.
  void tiles(const CacheGroup& g, const Block<C>& block, Own& own) const {
    const int64_t tokens = g.tiling.tokens, rows = padded(g.rows), columns = lane_ceil(block.count);
    float* s = own.scores.get();
    Span spans[kUnitRows];
    for (int64_t r = 0; r < rows; r += kTileRows) {
      const int64_t last = smaller(r + kTileRows, rows) - 1;
      spans[r / kTileRows] = {static_cast<int32_t>(own.lo[r]), static_cast<int32_t>(own.hi[last])};
    }
    for (int64_t h = 0; h < g.heads; ++h) {
      pack_keys(block, (g.head + h) * p_.keys.cache.stride[2], own);
      gemm_scores<Dot>(q_of(g, h, own), words(), packed_panels(own.panels.get(), words(), columns),
                       (p_.keys.dim + Dot::kPack - 1) / Dot::kPack, rows, spans, alpha(), s, tokens);
      by_fours(rows, [&](int64_t r, auto count) {
        constexpr int R = count();
        int64_t from, to;
        if (!span<R>(own, r, &from, &to)) return;
        transform<R>(g, h, block, s + r * tokens, from, to, own);
        softmax<R>(g, h, r, block, s + r * tokens, from, to, own);
        weigh<R>(g, h, block, s + r * tokens, from, smaller(to, block.count),
                 acc_of(g, h, own) + r * plan_.columns(), own);
      });
    }
  }

  // Transposes the block's keys of the head at `offset` elements into a row.
  void pack_keys(const Block<C>& block, int64_t offset, Own& own) const {
    for (int64_t t = 0; t < block.count; t += kLanes) {
      const int64_t count = smaller(kLanes, block.count - t);
      for (int64_t i = 0; i < count; ++i)
        pack_row<Dot>(block.keys[t + i] + offset, p_.keys.dim, own.key_rows.get() + i * words());
      pack_transposed(own.key_rows.get(), words(), count, words(), t, lane_ceil(block.count),
                      own.panels.get());
    }
  }

  // Range of columns visible to any of R rows from r on, in whole vectors.
  template <int R>
  static bool span(const Own& own, int64_t r, int64_t* from, int64_t* to) {
    *from = lane_floor(own.lo[r]);
    *to = lane_ceil(own.hi[r + R - 1]);
    return own.lo[r] < own.hi[r + R - 1];
  }

  float* gather(const float* const* scales, int64_t count, int64_t offset, Own& own) const {
    float* out = own.scales.get();
    for (int64_t t = 0; t < count; ++t) out[t] = scales[t][offset];
    for (int64_t t = count; t < lane_ceil(count); ++t) out[t] = 0.0f;
    return out;
  }

  // A scaled score with the softcap, in the unit of the softmax.
  Vec to_unit(Vec x) const {
    if (p_.softcap > 0.0f) x = mul(tanh(mul(x, set1(1.0f / p_.softcap)), nullptr), set1(p_.softcap));
    return mul(x, set1(Unit::kUnit));
  }

  bool transformed() const { return kCodes || p_.softcap > 0.0f; }
  float alpha() const { return transformed() ? p_.scale : p_.scale * Unit::kUnit; }

  // Applies the softcap to scaled scores and converts them to the unit of the softmax.
  template <int R>
  void transform(const CacheGroup& g, int64_t h, const Block<C>& block, float* s, int64_t from, int64_t to,
                 Own& own) const {
    if (!transformed()) return;
    const float* scales = nullptr;
    if constexpr (kCodes)
      scales = gather(block.key_scales, block.count, p_.keys.scale_stride[2] * (g.head + h), own);
    for (int64_t i = 0; i < R; ++i, s += g.tiling.tokens) {
      for (int64_t t = from; t < to; t += kLanes) {
        Vec x = load(s + t);
        if constexpr (kCodes) x = mul(x, load(scales + t));
        store(s + t, to_unit(x));
      }
    }
  }

  // Turns R rows of scores, from row r of a head on, into words of P; P absorbs the scales of a quantised V.
  template <int R>
  void softmax(const CacheGroup& g, int64_t h, int64_t r, const Block<C>& block, float* s, int64_t from,
               int64_t to, Own& own) const {
    const int64_t tokens = g.tiling.tokens;
    softmax_rows<Dot, kPrecision, R>(s, tokens, from, to, own.lo + r, own.hi + r, 0,
                                     own.state + h * padded(g.rows) + r,
                                     acc_of(g, h, own) + r * plan_.columns(), plan_.columns());
    if constexpr (kCodes) {
      const float* scales =
          gather(block.value_scales, block.count, p_.values.scale_stride[2] * (g.head + h), own);
      for (int64_t i = 0; i < R; ++i) {
        float* p = s + i * tokens;
        for (int64_t t = from; t < to; t += kLanes) store(p + t, mul(load(p + t), load(scales + t)));
      }
    }
  }

  // acc += P V for R rows of one head.
  template <int R>
  void weigh(const CacheGroup& g, int64_t h, const Block<C>& block, const float* p, int64_t from, int64_t end,
             float* acc, const Own& own) const {
    const int64_t offset = (g.head + h) * p_.values.cache.stride[2];
    const int64_t whole = (end - from) / Dot::kPack * Dot::kPack;
    multiply<R>(g, p + from / Dot::kPack, block.values + from, offset, whole, acc);
    if (whole == end - from) return;
    const C* last[2] = {block.values[end - 1] + offset, reinterpret_cast<const C*>(own.zeros.get())};
    multiply<R>(g, p + (end - 1) / Dot::kPack, last, 0, Dot::kPack, acc);
  }

  template <int R>
  void multiply(const CacheGroup& g, const float* p, const C* const* values, int64_t offset, int64_t tokens,
                float* acc) const {
    constexpr int kMost = kTileVecs == 4 ? (R == 4 ? 4 : 8) : (R == 4 ? 2 : 4), kLeast = M::kStep / kLanes;
    const int64_t dim = p_.values.dim, columns = plan_.columns(), stride = g.tiling.tokens;
    int64_t d = 0;
    for (; d + kMost * kLanes <= dim; d += kMost * kLanes)
      value_tile<M, R, kMost>(p, stride, values, offset + d, tokens, 0, acc + d, columns);
    for (; d + M::kStep <= dim; d += M::kStep)
      value_tile<M, R, kLeast>(p, stride, values, offset + d, tokens, 0, acc + d, columns);
    if (d < dim) value_tile<M, R, kLeast>(p, stride, values, offset + d, tokens, dim - d, acc + d, columns);
  }

  RowSum sum_of(const CacheGroup& g, int64_t h, int64_t r, const Own& own) const {
    const int64_t row = h * padded(g.rows) + r;
    if (!g.tiling.streams) return {own.state[row].m, reduce_add(load(own.state[row].l))};
    const StreamState state = stream_state(g, own);
    return {*state.max(row), *state.sum(0, row)};
  }

  float* partial_of(const CacheGroup& g, int64_t split, int64_t h, int64_t r, float* partial) const {
    return partial + ((split * g.heads + h) * g.rows + r) * plan_.partial_row();
  }

  void store_partial(const CacheGroup& g, int64_t split, const Own& own, float* partial) const {
    const int64_t columns = plan_.columns();
    for (int64_t h = 0; h < g.heads; ++h) {
      for (int64_t r = 0; r < g.rows; ++r) {
        float* out = partial_of(g, split, h, r, partial);
        memcpy(out, acc_of(g, h, own) + r * columns, columns * sizeof(float));
        const RowSum sum = sum_of(g, h, r, own);
        out[columns] = sum.m;
        out[columns + 1] = sum.l;
      }
    }
  }

  void finish_all(const CacheGroup& g, Own& own) const {
    for (int64_t h = 0; h < g.heads; ++h) {
      own.result.own.reset();
      for (int64_t r = 0; r < g.rows; ++r) {
        const RowSum sum = sum_of(g, h, r, own);
        result_.finish(g, h, r, sum.m, sum.l, acc_of(g, h, own) + r * plan_.columns(), own.result);
      }
    }
  }

  void merge(const CacheGroup& g, float* partial, Own& own) const {
    const int64_t columns = plan_.columns();
    float* acc = own.acc.get();
    for (int64_t h = 0; h < g.heads; ++h) {
      own.result.own.reset();
      for (int64_t r = 0; r < g.rows; ++r) {
        const RowSum sum = merge_splits<Unit>(partial_of(g, 0, h, r, partial), g.splits,
                                              g.heads * g.rows * plan_.partial_row(), columns, acc);
        result_.finish(g, h, r, sum.m, sum.l, acc, own.result);
      }
    }
  }

  const CacheProblem& p_;
  CachePlan plan_;
  const CacheResult<T, C> result_;
};

}  // namespace resformer::RESFORMER_ISA

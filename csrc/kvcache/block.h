// A block of consecutive tokens of one sequence as row addresses. Masked tokens are left out, so that the
// code that uses a block knows nothing of masks, pages or strides in time.
#pragma once

#include "kvcache/plan.h"

namespace resformer::RESFORMER_ISA {

template <class C>
struct Block {
  int64_t count = 0;
  int64_t end = 0;                                   // the first token after the block
  const C *keys[kMostTokens], *values[kMostTokens];  // of head 0
  const float *key_scales[kMostTokens], *value_scales[kMostTokens];
  int64_t at[kMostTokens];  // positions, ascending

  // Up to `most` tokens of [begin, end_of_split) that the mask lets through.
  void fill(const CacheProblem& p, int64_t sequence, int64_t begin, int64_t end_of_split, int64_t most) {
    count = 0;
    int64_t t = begin;
    const uint8_t* mask = p.mask ? p.mask + sequence * p.mask_stride[0] : nullptr;
    for (; t < end_of_split && count < most; ++t) {
      if (mask && !mask[t * p.mask_stride[1]]) continue;
      const CacheRow k = p.keys.table.place(sequence, t), v = p.values.table.place(sequence, t);
      at[count] = t;
      keys[count] = p.keys.cache.row<const C>(k.row, k.at, 0);
      values[count] = p.values.cache.row<const C>(v.row, v.at, 0);
      if (p.quantised) {
        key_scales[count] = p.keys.scale + k.row * p.keys.scale_stride[0] + k.at * p.keys.scale_stride[1];
        value_scales[count] =
            p.values.scale + v.row * p.values.scale_stride[0] + v.at * p.values.scale_stride[1];
      }
      ++count;
    }
    end = t;
  }

  // Number of tokens before position `t`.
  int64_t before(int64_t t) const {
    if (count == 0 || t <= at[0]) return 0;
    if (t > at[count - 1]) return count;
    int64_t low = 0, high = count - 1;  // at[low] < t <= at[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (at[middle] < t ? low : high) = middle;
    }
    return high;
  }
};

// The next block, prefetched while the current one is processed: one line for each line that is read, in the
// order of memory. In bursts the processor drops prefetches that it has no buffer for, and between bursts
// memory idles. Rows of K and V alternate, so that memory is as busy while V is read, which may lie in a
// cache where all layers share it, as while K is.
template <class C>
struct Following {
  const Block<C>& block;
  int64_t heads_on;  // its first head, relative to that of the current block
  bool alternate;    // rows of K and V are of one shape

  // Bytes from row t of `now` to the row to prefetch; 0 without one.
  int64_t key(const Block<C>& now, int64_t t, int64_t head_stride) const {
    return alternate ? either(now.keys[t], t, head_stride) : ahead(now.keys[t], block.keys, t, head_stride);
  }
  int64_t value(const Block<C>& now, int64_t t, int64_t head_stride) const {
    return alternate ? either(now.values[t], now.count + t, head_stride)
                     : ahead(now.values[t], block.values, t, head_stride);
  }

 private:
  int64_t either(const C* from, int64_t i, int64_t head_stride) const {
    return ahead(from, i % 2 ? block.values : block.keys, i / 2, head_stride);
  }
  int64_t ahead(const C* from, const C* const* rows, int64_t t, int64_t head_stride) const {
    if (t >= block.count) return 0;
    return reinterpret_cast<const char*>(rows[t] + heads_on * head_stride) -
           reinterpret_cast<const char*>(from);
  }
};

}  // namespace resformer::RESFORMER_ISA

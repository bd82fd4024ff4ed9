// A block of consecutive tokens of one sequence: where their rows lie, whatever the layout of the cache.
// Masked tokens are left out, so that nothing after this knows of masks, pages or strides in time.
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
      int64_t row, within;
      p.place(sequence, t, &row, &within);
      at[count] = t;
      keys[count] = p.keys.cache.row<const C>(row, within, 0);
      values[count] = p.values.cache.row<const C>(row, within, 0);
      if (p.quantised) {
        key_scales[count] = p.keys.scale + row * p.keys.scale_stride[0] + within * p.keys.scale_stride[1];
        value_scales[count] =
            p.values.scale + row * p.values.scale_stride[0] + within * p.values.scale_stride[1];
      }
      ++count;
    }
    end = t;
  }

  // Tiles of scores take several tokens: past the end, the last one again.
  void pad() {
    for (int64_t i = count; i < round_up(count, kFewTokens); ++i) keys[i] = keys[count - 1];
  }

  // How many of the tokens lie before position `t`.
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

// Fetches a block while another is worked on, in the order of memory: one line for each line that is read,
// for in bursts the processor drops what it has no buffer for, and between bursts memory idles.
class Ahead {
 public:
  template <class C>
  Ahead(const C* const* rows, int64_t count, int64_t head, int64_t heads, int64_t head_stride, int64_t dim)
      : rows_(reinterpret_cast<const char* const*>(rows)),
        left_(count),
        first_(head * head_stride * static_cast<int64_t>(sizeof(C))),
        stride_(head_stride * static_cast<int64_t>(sizeof(C))),
        bytes_(dim * static_cast<int64_t>(sizeof(C))),
        runs_(heads) {
    if (head_stride == dim) {  // the heads of a token are one run of memory
      bytes_ *= heads;
      runs_ = 1;
    }
    run_ = runs_;
  }

  // The lines of one run of memory. A loop keeps it in registers.
  struct Run {
    const char *at, *end;
    int64_t step;
  };

  RESFORMER_INLINE void step(Run& run) {
    run.at += run.step;
    if (run.at >= run.end) run = next();
  }

  RESFORMER_INLINE Run next() {
    if (run_ == runs_) {
      run_ = 0;
      if (left_ == 0) {  // the last line again, which costs nothing
        run_ = runs_;
        const char* here = reinterpret_cast<const char*>(this);
        return {here, here + 1, 0};
      }
      --left_;
      token_ = *rows_++ + first_;
    }
    const char* at = token_ + run_++ * stride_;
    return {at, at + bytes_, 64};
  }

 private:
  const char* token_ = nullptr;
  const char* const* rows_;
  int64_t left_, first_, stride_, bytes_, runs_, run_ = 0;
};

}  // namespace resformer::RESFORMER_ISA

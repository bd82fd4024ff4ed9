// One call of attention_with_kvcache as plain data, passed from the op boundary (kvcache_cpu.cpp) to a build
// of the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "common/epilogue.h"
#include "common/view.h"

namespace resformer {

// Where a token lies on the first two axes of a cache.
struct CacheRow {
  int64_t row, at;
};

// Pages of each sequence by number; without `pages` the cache is contiguous.
struct BlockTable {
  const int32_t* pages = nullptr;
  int64_t stride[2] = {0, 0}, page_size = 1;

  RESFORMER_INLINE CacheRow place(int64_t sequence, int64_t token) const {
    if (!pages) return {sequence, token};
    return {pages[sequence * stride[0] + token / page_size * stride[1]], token % page_size};
  }
};

// Keys or values: rows of (batch or page, time, head), floats, or int8 codes with a scale per row.
struct CacheSide {
  View cache, added;  // added has no data where the call appends none
  BlockTable table;
  float* scale = nullptr;
  int64_t scale_stride[3] = {0, 0, 0};
  int64_t dim = 0;
};

// Rows of one sequence in time: `first` counts from its own first row, or where packed from that of all.
struct TimeRange {
  int64_t first = 0, count = 0;
};

// One sequence: `length` tokens after the append. The mask leaves keys in [first, last).
struct CacheSequence {
  int64_t length = 0, first = 0, last = 0;
  TimeRange queries, added;
};

struct CacheProblem {
  DType dtype = DType::float32;  // of q, k, v and out
  bool quantised = false;        // the caches hold int8
  View q, out;
  CacheSide keys, values;
  std::vector<CacheSequence> sequences;
  int64_t heads_q = 0, heads_kv = 0, group = 1;
  const uint8_t* mask = nullptr;  // nullptr: every key
  int64_t mask_stride[2] = {0, 0};
  int64_t window_left = -1, window_right = -1;
  float scale = 1.0f, softcap = 0.0f;
  const float* sinks = nullptr;
  Epilogue epilogue;
  int64_t splits = 0;  // 0: by length
  float* lse = nullptr;
  int64_t lse_stride[2] = {0, 0};  // of sequences and heads; queries are contiguous

  // Whether rows of K and V are as long and as far from one head to the next.
  bool alike() const { return keys.dim == values.dim && keys.cache.stride[2] == values.cache.stride[2]; }
  // Keys [lo, hi) that the window opens to a query: query i stands at key i + length - queries.
  RESFORMER_INLINE int64_t key_lo(const CacheSequence& s, int64_t i) const {
    const int64_t lo = window_left < 0 ? 0 : i + s.length - s.queries.count - window_left;
    return lo < 0 ? 0 : lo > s.length ? s.length : lo;
  }
  RESFORMER_INLINE int64_t key_hi(const CacheSequence& s, int64_t i) const {
    const int64_t hi = window_right < 0 ? s.length : i + s.length - s.queries.count + window_right + 1;
    return hi < 0 ? 0 : hi > s.length ? s.length : hi;
  }
};

struct CacheKernels {
  void (*append)(const CacheProblem&);
  void (*attend)(const CacheProblem&);
};

}  // namespace resformer

// Rows of float32 in whole vectors, zero past the row's end, that the epilogues of attention work on.
#pragma once

#include "common/epilogue.h"
#include "common/parallel.h"
#include "common/rows.h"

namespace resformer::RESFORMER_ISA {

template <class T>
static inline void widen_row(const T* src, int64_t dim, float* out) {
  pack_row<F32>(src, dim, out);
}

// columns is a number of whole vectors.
static inline float dot_columns(const float* a, const float* b, int64_t columns) {
  Vec sum = zero();
  for (int64_t d = 0; d < columns; d += kLanes) sum = fma(load(a + d), load(b + d), sum);
  return reduce_add(sum);
}

// a += factor b
static inline void add_columns(float factor, const float* b, int64_t columns, float* a) {
  const Vec x = set1(factor);
  for (int64_t d = 0; d < columns; d += kLanes) store(a + d, fma(x, load(b + d), load(a + d)));
}

// A row of a coefficient that differs from channel to channel.
static inline void coefficient_row(const Coefficient& c, int64_t offset, int64_t dim, float* out) {
  if (c.stride[3] != 1) {
    for (int64_t d = 0; d < dim; ++d) out[d] = c.load(offset + d * c.stride[3]);
    for (int64_t d = dim; d < round_up(dim, kLanes); ++d) out[d] = 0.0f;
  } else if (c.dtype == DType::bfloat16) {
    widen_row(static_cast<const bf16*>(c.data) + offset, dim, out);
  } else if (c.dtype == DType::float16) {
    widen_row(static_cast<const f16*>(c.data) + offset, dim, out);
  } else {
    widen_row(static_cast<const float*>(c.data) + offset, dim, out);
  }
}

// row *= gate. `scratch` has room for a row.
static inline void gate_columns(const Epilogue& e, int64_t b, int64_t t, int64_t h, int64_t dim,
                                float* scratch, float* row) {
  const int64_t columns = round_up(dim, kLanes);
  if (e.gate.uniform_in_row()) {
    const Vec g = set1(e.gate.at(b, t, h, 0));
    for (int64_t d = 0; d < columns; d += kLanes) store(row + d, mul(load(row + d), g));
    return;
  }
  coefficient_row(e.gate, e.gate.row(b, t, h), dim, scratch);
  for (int64_t d = 0; d < columns; d += kLanes) store(row + d, mul(load(row + d), load(scratch + d)));
}

// The value at a query's own position, kept from head to head of a group.
class OwnValue {
 public:
  explicit OwnValue(int64_t dim) : w_(round_up(dim, kLanes)), columns_(round_up(dim, kLanes)) {}

  // Forgets the row: the next one may belong to another head.
  void reset() { query_ = -1; }

  // Reads query i's row by `read(w)`, which returns whether there is one.
  template <class Read>
  void at(int64_t i, float least, const Read& read) {
    if (query_ == i) return;
    query_ = i;
    if (!read(w_.get())) memset(w_.get(), 0, columns_ * sizeof(float));
    const float size = dot_columns(w_.get(), w_.get(), columns_);
    above_ = size > least;
    size_ = size < least ? least : size;
  }

  const float* w() const { return w_.get(); }
  float size() const { return size_; }   // max(|w|, eps)^2
  bool above() const { return above_; }  // whether |w| is that

 private:
  Scratch w_;
  int64_t columns_, query_ = -1;
  float size_ = 0.0f;
  bool above_ = false;
};

// y becomes u = y - e a w and then, in its dtype, out. Returns a; `ungated` receives u where it is given.
template <class T>
static inline float finish_row(const Epilogue& e, const OwnValue& own, int64_t b, int64_t t, int64_t h,
                               int64_t dim, float* scratch, float* y, T* ungated, T* out) {
  const int64_t columns = round_up(dim, kLanes);
  float along = 0.0f;
  if (e.excludes) {
    along = dot_columns(y, own.w(), columns) / own.size();
    add_columns(-e.exclusive.at(b, t, h, 0) * along, own.w(), columns, y);
  }
  if (ungated) scale_row(y, 1.0f, dim, ungated);
  if (e.gates && e.gate.uniform_in_row()) {
    scale_row(y, e.gate.at(b, t, h, 0), dim, out);
  } else {
    if (e.gates) gate_columns(e, b, t, h, dim, scratch, y);
    scale_row(y, 1.0f, dim, out);
  }
  return along;
}

}  // namespace resformer::RESFORMER_ISA

// Rows of float32 in whole vectors, zero past the row's end, that the epilogues of attention work on.
#pragma once

#include "common/epilogue.h"
#include "common/parallel.h"
#include "common/rows.h"

namespace resformer::RESFORMER_ISA {

// row *= gate, which differs from channel to channel. `scratch` has room for a row.
static inline void gate_channels(const Coefficient& gate, int64_t offset, int64_t dim, float* scratch,
                                 float* row) {
  coefficient_row(gate, offset, dim, scratch);
  for (int64_t d = 0; d < dim; d += kLanes) store(row + d, mul(load(row + d), load(scratch + d)));
}

// The value at a query's own position, kept from head to head of a group.
class OwnValue {
 public:
  explicit OwnValue(int64_t dim) : row_(round_up(dim, kLanes)), columns_(round_up(dim, kLanes)) {}

  // Forgets the row: the next one may belong to another head.
  void reset() { query_ = -1; }

  // Finds query i's row by `read(row)`, which fills the row and returns it, or another one, or nullptr where
  // there is none.
  template <class Read>
  void at(int64_t i, float least, const Read& read) {
    if (query_ == i) return;
    query_ = i;
    w_ = read(row_.get());
    if (!w_) {
      memset(row_.get(), 0, columns_ * sizeof(float));
      w_ = row_.get();
    }
    Vec sum = zero();
    for (int64_t d = 0; d < columns_; d += kLanes) sum = fma(load(w_ + d), load(w_ + d), sum);
    const float size = reduce_add(sum);
    above_ = size > least;
    size_ = size < least ? least : size;
  }

  const float* w() const { return w_; }
  float size() const { return size_; }   // max(|w|, eps)^2
  bool above() const { return above_; }  // whether |w| is that

 private:
  Scratch row_;
  const float* w_ = nullptr;
  int64_t columns_, query_ = -1;
  float size_ = 0.0f;
  bool above_ = false;
};

// Turns y = factor * acc into out and returns a; `ungated` receives u where it is given. acc is overwritten.
template <class T>
static inline float finish_row(const Epilogue& e, const OwnValue& own, int64_t b, int64_t t, int64_t h,
                               int64_t dim, float factor, float* scratch, float* acc, T* ungated, T* out) {
  const Vec scale = set1(factor);
  float along = 0.0f;
  if (e.excludes) {
    Vec sum = zero();
    for (int64_t d = 0; d < dim; d += kLanes) sum = fma(load(acc + d), load(own.w() + d), sum);
    along = factor * reduce_add(sum) / own.size();
    const Vec part = set1(-e.exclusive.at(b, t, h, 0) * along);
    for (int64_t d = 0; d < dim; d += kLanes)
      store(acc + d, fma(part, load(own.w() + d), mul(scale, load(acc + d))));
  } else {
    for (int64_t d = 0; d < dim; d += kLanes) store(acc + d, mul(scale, load(acc + d)));
  }
  if (ungated) scale_row(acc, 1.0f, dim, ungated);
  const bool channels = !e.gate.uniform_in_row();
  if (channels) gate_channels(e.gate, e.gate.row(b, t, h), dim, scratch, acc);
  scale_row(acc, channels ? 1.0f : e.gate.at(b, t, h, 0), dim, out);
  return along;
}

}  // namespace resformer::RESFORMER_ISA

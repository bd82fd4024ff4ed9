// What follows the softmax: out = gate (y - exclusive (y.w) / max(|w|, eps)^2 w), with w the value at the
// query's own position (exclusive self-attention, arXiv 2603.09078). The equations of the gradients stand in
// resformer_kernels/attention/epilogue.py.
#pragma once

#include "common/coefficients.h"

namespace resformer {

struct Epilogue {
  bool excludes = false, gates = false;
  Coefficient exclusive{}, gate{};  // over (batch, time, query head, channel); no gate: the number 1
  float least = 0.0f;               // eps squared

  RESFORMER_INLINE bool any() const { return excludes || gates; }
};

}  // namespace resformer

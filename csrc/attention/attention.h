// One attention call as plain data, passed from the op boundary (attention_cpu.cpp) to a build of the
// kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "common/coefficients.h"
#include "common/epilogue.h"
#include "common/view.h"

namespace resformer {

// attn_bias as (B, Hq, Tq, Tk) with stride 0 where it broadcasts.
struct Bias {
  enum class Kind { none, boolean, additive };
  Kind kind = Kind::none;
  DType dtype = DType::float32;
  const void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};
};

// Backward's tiles. 96 rows of float32 at head_dim 64 are half of a first-level cache; multiples of 6 and 16.
constexpr int64_t kGradRows = 96;
constexpr int64_t kGradKeys = 96;

// One sequence: a batch entry, or the part of a packed tensor between two cu_seqlens.
struct Sequence {
  int64_t batch = 0;
  int64_t q_start = 0, k_start = 0;
  int64_t tq = 0, tk = 0;
  int64_t diagonal = 0;      // query i stands at key i + diagonal
  int64_t column_start = 0;  // tiles of kGradKeys keys in the sequences before this one
};

struct Problem {
  DType dtype = DType::float32;
  std::vector<Sequence> sequences;
  int64_t queries_total = 0, keys_total = 0;  // the lengths of q's and v's time axes
  int64_t heads_q = 0, heads_kv = 0, group = 1, dim_k = 0, dim_v = 0;
  View q, k, v, v_first;  // one of v and v_first has no data where nothing is mixed
  Coefficient lambda_v{}, lambda_first{};
  int64_t window_left = -1, window_right = -1;
  float scale = 1.0f, softcap = 0.0f;
  const float* sinks = nullptr;  // (Hq,)
  Bias bias;
  Epilogue epilogue;

  RESFORMER_INLINE int64_t head_count() const { return static_cast<int64_t>(sequences.size()) * heads_kv; }
  RESFORMER_INLINE bool mixes() const { return v.data != nullptr && v_first.data != nullptr; }

  // The keys [lo, hi) that query i of a sequence may attend to by position.
  RESFORMER_INLINE int64_t key_lo(const Sequence& s, int64_t i) const {
    const int64_t lo = window_left < 0 ? 0 : i + s.diagonal - window_left;
    return lo < 0 ? 0 : lo > s.tk ? s.tk : lo;
  }
  RESFORMER_INLINE int64_t key_hi(const Sequence& s, int64_t i) const {
    const int64_t hi = window_right < 0 ? s.tk : i + s.diagonal + window_right + 1;
    return hi < 0 ? 0 : hi > s.tk ? s.tk : hi;
  }
  // Where query i's numbers lie in contiguous (batch, time, query head).
  RESFORMER_INLINE int64_t query_row(int64_t b, int64_t t, int64_t h) const {
    return (b * queries_total + t) * heads_q + h;
  }
};

struct ForwardOutput {
  View out, mixed;                    // mixed has no data where it is not asked for
  float* lse = nullptr;               // natural log; nullptr where it is not asked for
  int64_t lse_stride[3] = {0, 0, 1};  // batch, head, time
  View ungated;                       // no data where it is not asked for, as below
  float* along = nullptr;             // laid out as the LSE
};

struct BackwardInput {
  View grad_out, out;  // out, or where `ungated` what the gate multiplied
  bool ungated = false;
  const float* along = nullptr;     // laid out as the LSE; nullptr: nothing is excluded
  View grad_mixed;                  // no data: zero
  const float* grad_lse = nullptr;  // nullptr: zero
  int64_t grad_lse_stride[3] = {0, 0, 0};
  const float* lse = nullptr;
  int64_t lse_stride[3] = {0, 0, 1};

  RESFORMER_INLINE float grad_lse_at(int64_t b, int64_t h, int64_t t) const {
    const int64_t* s = grad_lse_stride;
    return grad_lse ? grad_lse[b * s[0] + h * s[1] + t * s[2]] : 0.0f;
  }
};

// Gradients of a coefficient leave the kernel as float32 partial sums of dV' * V in a fixed order, which the
// op boundary then sums to the coefficient's shape: over head_dim for every key (row), over each tile of
// kGradKeys keys for every channel (column), or not at all (element).
enum class Partial { none, row, column, element };

struct BackwardOutput {
  View dq, dk, dv, dv_first;  // no data: not wanted
  Partial lambda_v_partial = Partial::none, lambda_first_partial = Partial::none;
  float* lambda_v = nullptr;
  float* lambda_first = nullptr;
  float* sinks = nullptr;  // one per query and head, laid out as the LSE
  struct {
    float* data = nullptr;   // zero on entry, strides 0 where the bias broadcasts:
    double* sums = nullptr;  // in its place where many terms add to one entry: float64
    int64_t stride[4] = {0, 0, 0, 0};
    bool wanted() const { return data != nullptr || sums != nullptr; }
  } bias;
  float* exclusive = nullptr;  // one per query and head: Problem::query_row
  float* gate = nullptr;       // the same, or with `gate_rows` false one for each channel too
  bool gate_rows = true;
  bool bias_shared = false;  // several (batch, head) pairs add to one entry
};

struct Kernels {
  void (*forward)(const Problem&, const ForwardOutput&);
  void (*backward)(const Problem&, const BackwardInput&, const BackwardOutput&);
};

}  // namespace resformer

// The arguments of the reservoir's ops: checked, then packed (weights) and padded (vectors) for the kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/huge_pages.h"
#include "common/tensor_args.h"
#include "reservoir/reservoir_plan.h"

namespace resformer::reservoir_host {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Entries of W: with fewer, a step is too short for chunks to pay.
constexpr int64_t kPayingEntries = 1024;

// W as it was given. Entries of sparse weights are widened: they may be transposed.
struct WeightArgs {
  WeightKind kind = WeightKind::groups;
  ReservoirLayout layout{1, 0, 0};
  ReservoirMatrix matrix{};
  std::vector<float> entries;
  std::vector<int64_t> rows;
  std::vector<int32_t> columns;

  // Whether chunks at once are faster than step after step.
  bool pays() const {
    const int64_t stored = static_cast<int64_t>(columns.size());
    const int64_t size = kind == WeightKind::groups ? layout.units() * layout.size : stored;
    return kind != WeightKind::entries && size >= kPayingEntries;
  }
};

inline int64_t padded(int64_t units) { return (units + kPadding - 1) / kPadding * kPadding; }

inline Mode checked_mode(int64_t mode) {
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "mode must be 0, 1 or 2, got ", mode);
  return static_cast<Mode>(mode);
}

inline DType weight_dtype(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  const DType dtype = dtype_of(t, name);
  STD_TORCH_CHECK(dtype != DType::float16, name, " must be float32 or bfloat16");
  return dtype;
}

inline std::vector<float> widened(const Tensor& t, const char* name) {
  const DType dtype = weight_dtype(t, name);
  std::vector<float> out(t.numel());
  for (int64_t i = 0; i < t.numel(); ++i) {
    const int64_t at = i * t.stride(0);
    out[i] = dtype == DType::float32 ? static_cast<const float*>(t.const_data_ptr())[at]
                                     : to_float(static_cast<const bf16*>(t.const_data_ptr())[at]);
  }
  return out;
}

inline std::vector<int64_t> indices(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.scalar_type() == ScalarType::Long, name,
                  " must be a 1-D int64 CPU tensor");
  std::vector<int64_t> out(t.numel());
  const int64_t* from = static_cast<const int64_t*>(t.const_data_ptr());
  for (int64_t i = 0; i < t.numel(); ++i) out[i] = from[i * t.stride(0)];
  return out;
}

inline void read_sparse(const Tensor& weight, const std::optional<Tensor>& rows,
                        const std::optional<Tensor>& columns, WeightArgs* w) {
  w->entries = widened(weight, "weight");
  const int64_t count = weight.numel();
  int64_t units = count;
  w->kind = WeightKind::entries;
  if (rows) {
    w->kind = WeightKind::csr;
    w->rows = indices(*rows, "rows");
    units = static_cast<int64_t>(w->rows.size()) - 1;
    STD_TORCH_CHECK(columns.has_value() && units >= 1 && w->rows[0] == 0 && w->rows[units] == count,
                    "rows must start at 0 and end at the number of entries");
    for (int64_t i = 0; i < units; ++i)
      STD_TORCH_CHECK(w->rows[i] <= w->rows[i + 1], "rows must not decrease");
  }
  w->layout = {1, units, padded(units)};
  w->columns.resize(count);
  const std::vector<int64_t> given = columns ? indices(*columns, "columns") : std::vector<int64_t>();
  STD_TORCH_CHECK(!columns || static_cast<int64_t>(given.size()) == count,
                  "columns must have one index an entry");
  for (int64_t i = 0; i < count; ++i) {
    const int64_t column = columns ? given[i] : i;
    STD_TORCH_CHECK(column >= 0 && column < units, "columns must lie in [0, ", units, "), got ", column);
    w->columns[i] = static_cast<int32_t>(column);
  }
}

inline WeightArgs read_weight(const Tensor& weight, const std::optional<Tensor>& rows,
                              const std::optional<Tensor>& columns) {
  WeightArgs w;
  const int64_t rank = weight.dim();
  STD_TORCH_CHECK(rank >= 1 && rank <= 3 && (rank == 1 || !(rows || columns)),
                  "weight must have 1 to 3 axes, and 1 with indices, got ", rank);
  if (rank == 1) {
    read_sparse(weight, rows, columns, &w);
  } else {
    const int64_t size = weight.size(rank - 1);
    STD_TORCH_CHECK(weight.size(rank - 2) == size && weight.numel() > 0,
                    "weight must be square and not empty");
    w.layout = {rank == 3 ? weight.size(0) : 1, size, padded(size)};
    w.matrix = {weight_dtype(weight, "weight"), weight.const_data_ptr(), rank == 3 ? weight.stride(0) : 0,
                weight.stride(rank - 2),        weight.stride(rank - 1), size};
  }
  STD_TORCH_CHECK(w.layout.units() < (int64_t{1} << 31), "weight has too many units");
  return w;
}

// Wᵀ. The columns of one-entry rows must be a permutation.
inline WeightArgs transposed(WeightArgs w) {
  if (w.kind == WeightKind::groups) {
    std::swap(w.matrix.unit_stride, w.matrix.k_stride);
    return w;
  }
  const int64_t units = w.layout.units(), count = static_cast<int64_t>(w.entries.size());
  std::vector<int64_t> starts(units + 1), rows(count);
  for (int64_t i = 0; i < count; ++i) ++starts[w.columns[i] + 1];
  for (int64_t i = 0; i < units; ++i) {
    starts[i + 1] += starts[i];
    if (w.kind == WeightKind::csr) std::fill(rows.begin() + w.rows[i], rows.begin() + w.rows[i + 1], i);
  }
  STD_TORCH_CHECK(
      w.kind == WeightKind::csr ||
          [&] {
            for (int64_t i = 0; i <= units; ++i)
              if (starts[i] != i) return false;
            return true;
          }(),
      "columns must be a permutation of the units");
  std::vector<int64_t> next(starts);
  WeightArgs t = w;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t at = next[w.columns[i]]++;
    t.entries[at] = w.entries[i];
    t.columns[at] = static_cast<int32_t>(w.kind == WeightKind::csr ? rows[i] : i);
  }
  if (w.kind == WeightKind::csr) t.rows = starts;
  return t;
}

inline Streams read_streams(const Tensor& t, const char* name, const std::optional<Tensor>& cu_seqlens) {
  const int64_t rank = t.dim();
  STD_TORCH_CHECK(rank == (cu_seqlens ? 2 : 3), name, " must have ", cu_seqlens ? 2 : 3, " axes, got ", rank);
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float, name, " must be a float32 CPU tensor");
  STD_TORCH_CHECK(t.numel() == 0 || t.size(rank - 1) == 1 || t.stride(rank - 1) == 1, name,
                  " must be contiguous in its last axis, got stride ", t.stride(rank - 1));
  Streams s{};
  s.inputs = static_cast<const float*>(t.const_data_ptr());
  s.input_stride = t.stride(rank - 2);
  if (!cu_seqlens) {
    for (int64_t b = 0; b < t.size(0); ++b) {
      s.sequences.push_back({b * t.size(1), t.size(1)});
      s.inputs_at.push_back(b * t.stride(0));
    }
    return s;
  }
  const int32_t* offsets = check_cu_seqlens(*cu_seqlens, "cu_seqlens", t.size(0));
  for (int64_t i = 0; i + 1 < cu_seqlens->numel(); ++i) {
    s.sequences.push_back({offsets[i], offsets[i + 1] - offsets[i]});
    s.inputs_at.push_back(offsets[i] * t.stride(0));
  }
  return s;
}

// States of every step of `like`, entered into `streams`; zeros after the last packed sequence.
inline Tensor states_like(const Tensor& like, int64_t units, Streams& streams, bool packed) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes.back() = units;
  Tensor states = output(like, sizes, ScalarType::Float);
  prefer_large_pages(states.mutable_data_ptr(), states.numel() * static_cast<int64_t>(sizeof(float)));
  streams.states = static_cast<float*>(states.mutable_data_ptr());
  streams.state_stride = units;
  int64_t used = 0;
  for (const Sequence& s : streams.sequences) {
    streams.states_at.push_back(s.offset * units);
    used = s.offset + s.length;
  }
  if (packed) std::memset(streams.states + used * units, 0, (like.size(0) - used) * units * sizeof(float));
  return states;
}

inline void check_states(const Tensor& t, const char* name, int64_t count, int64_t units) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == count && t.size(1) == units &&
                      t.is_contiguous() && t.scalar_type() == ScalarType::Float,
                  name, " must be a contiguous float32 CPU tensor (", count, ", ", units, ")");
}

inline void pad(const ReservoirLayout& layout, const float* from, float* to) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    std::memcpy(to + g * layout.padded, from + g * layout.size, layout.size * sizeof(float));
  }
}

inline void unpad(const ReservoirLayout& layout, const float* from, float* to) {
  for (int64_t g = 0; g < layout.groups; ++g) {
    std::memcpy(to + g * layout.size, from + g * layout.padded, layout.size * sizeof(float));
  }
}

// A step, and the memory that it points to. W is packed here.
class Prepared {
 public:
  Prepared(const ReservoirKernels& kernels, const WeightArgs& w, bool adjoint)
      : step{},
        kernels_(kernels),
        w_(w),
        weight_(1),
        input_weight_(1),
        retain_(w.layout.width()),
        amplitude_(retain_),
        bias_(retain_) {
    step.layout = w.layout;
    step.kind = w.kind;
    step.adjoint = adjoint;
    step.rows = w.rows.data();
    step.weight_dtype = DType::float32;
    if (w.kind == WeightKind::groups) {
      step.weight_dtype = w.matrix.dtype;
      step.weight = pack(w.matrix, false, &weight_);
      return;
    }
    // Padding has entries of zero.
    entries_ = w.entries;
    columns_ = w.columns;
    if (w.kind == WeightKind::entries) {
      entries_.resize(w.layout.padded);
      columns_.resize(w.layout.padded);
      find_runs();
    }
    step.weight = entries_.data();
    step.columns = columns_.data();
    step.runs = runs_.data();
  }

  void set_leak(const Tensor& leak) {
    for_units(leak, "leak", [&](float a, int64_t at) {
      retain_[at] = 1.0f - a;
      amplitude_[at] = a;
    });
    step.retain = retain_.data();
    step.amplitude = amplitude_.data();
  }

  void set_bias(const Tensor& bias) {
    STD_TORCH_CHECK(bias.dim() == 1, "bias must have 1 axis, got ", bias.dim());
    for_units(bias, "bias", [&](float b, int64_t at) { bias_[at] = b; });
    step.bias = bias_.data();
  }

  void set_input_weight(const Tensor& t, int64_t inputs) {
    const DType dtype = weight_dtype(t, "input_weight");
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == w_.layout.units() && t.size(1) == inputs,
                    "input_weight must be (", w_.layout.units(), ", ", inputs, ")");
    STD_TORCH_CHECK(inputs > 0, "input_weight must have at least one input");
    step.inputs = inputs;
    step.input_weight = static_cast<const float*>(
        pack({dtype, t.const_data_ptr(), w_.layout.size * t.stride(0), t.stride(0), t.stride(1), inputs},
             true, &input_weight_));
  }

  int64_t work_per_step() const {
    const int64_t units = w_.layout.units();
    const int64_t recurrent = w_.kind == WeightKind::groups ? units * w_.layout.size
                              : w_.kind == WeightKind::csr  ? 8 * static_cast<int64_t>(entries_.size())
                                                            : 0;
    return recurrent + units * (step.inputs + 16);
  }

  int64_t weight_bytes() const {
    if (w_.kind == WeightKind::groups) {
      return w_.layout.units() * w_.layout.size * (step.weight_dtype == DType::bfloat16 ? 2 : 4);
    }
    return static_cast<int64_t>(entries_.size()) * 8;
  }

  ReservoirStep step;

 private:
  const void* pack(const ReservoirMatrix& m, bool widen, Scratch* to) {
    const ReservoirLayout& layout = w_.layout;
    const bool narrow = m.dtype == DType::bfloat16 && !widen;
    const int64_t elements = layout.width() * m.k;
    void* out = to->at_least(narrow ? (elements + 1) / 2 : elements);
    const int64_t panels = panels_of(layout, kernels_.panel);
    const int64_t grain = std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, m.k * kernels_.panel));
    torch::stable::parallel_for(0, panels, grain, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) kernels_.pack(m, layout, p, widen, out);
    });
    return out;
  }

  void find_runs() {
    for (int64_t q = 0; q < w_.layout.padded; q += kPadding) {
      bool run = columns_[q] + kPadding <= w_.layout.padded;
      for (int64_t j = 1; run && j < kPadding; ++j) run = columns_[q + j] == columns_[q] + j;
      runs_.push_back(run);
    }
    step.independent = true;
    for (int64_t i = 0; i < w_.layout.size; ++i) step.independent = step.independent && columns_[i] == i;
  }

  // body(value, padded place) for every unit of a vector, or of a scalar.
  template <class Body>
  void for_units(const Tensor& t, const char* name, const Body& body) {
    const ReservoirLayout& layout = w_.layout;
    const int64_t units = layout.units();
    const bool scalar = t.dim() == 0;
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float &&
                        (scalar || (t.dim() == 1 && t.size(0) == units)),
                    name, " must be a float32 CPU tensor () or (", units, ",)");
    const float* from = static_cast<const float*>(t.const_data_ptr());
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t at = unit / layout.size * layout.padded + unit % layout.size;
      body(from[scalar ? 0 : unit * t.stride(0)], at);
    }
  }

  const ReservoirKernels& kernels_;
  const WeightArgs& w_;
  Scratch weight_, input_weight_;
  std::vector<float> retain_, amplitude_, bias_, entries_;
  std::vector<int32_t> columns_;
  std::vector<uint8_t> runs_;
};

}  // namespace resformer::reservoir_host

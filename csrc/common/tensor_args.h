// Checks and conversions between stable-ABI tensors and the plain data of kernels. Only op boundaries include
// this.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <vector>

#include "common/coefficients.h"
#include "common/epilogue.h"
#include "common/poison.h"

namespace resformer {
namespace {

inline DType dtype_of(const torch::stable::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return DType::float32;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::bfloat16;
    case torch::headeronly::ScalarType::Half:
      return DType::float16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 for the native backend");
  }
}

inline void check_input(const torch::stable::Tensor& t, const char* name, int64_t rank,
                        torch::headeronly::ScalarType dtype) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t.dim() == rank, name, " must have ", rank, " axes, got ", t.dim());
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must have q's dtype");
  STD_TORCH_CHECK(t.numel() == 0 || t.size(rank - 1) == 1 || t.stride(rank - 1) == 1, name,
                  " must be contiguous in its last axis, got stride ", t.stride(rank - 1));
}

inline void check_size(const torch::stable::Tensor& t, const char* name, int64_t axis, int64_t size) {
  STD_TORCH_CHECK(t.size(axis) == size, name, " must have size ", size, " in axis ", axis, ", got ",
                  t.size(axis));
}

// Ascending int32 offsets from 0 to at most `total`; nothing is read through them before they are checked.
inline const int32_t* check_cu_seqlens(const torch::stable::Tensor& t, const char* name, int64_t total) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 1 && t.numel() >= 1 && t.is_contiguous() &&
                      t.scalar_type() == torch::headeronly::ScalarType::Int,
                  name, " must be a contiguous 1-D int32 CPU tensor with at least one element");
  const int32_t* data = static_cast<const int32_t*>(t.data_ptr());
  STD_TORCH_CHECK(data[0] == 0, name, " must start at 0, got ", data[0]);
  for (int64_t i = 1; i < t.numel(); ++i) {
    STD_TORCH_CHECK(data[i] >= data[i - 1], name, " must not decrease, got ", data[i - 1], " then ", data[i],
                    " at ", i);
  }
  STD_TORCH_CHECK(data[t.numel() - 1] <= total, name, " must end within the packed tokens (", total,
                  "), got ", data[t.numel() - 1]);
  return data;
}

// A coefficient has the rank of `shape` and size 1 wherever it broadcasts; `like` is on its device.
inline Coefficient read_coefficient(const std::optional<torch::stable::Tensor>& c, const char* name,
                                    double number, const torch::stable::Tensor& like,
                                    const std::vector<int64_t>& shape, DType dtype) {
  Coefficient out{nullptr, DType::float32, static_cast<float>(number), {0, 0, 0, 0}};
  if (!c) return out;
  const int64_t rank = static_cast<int64_t>(shape.size());
  STD_TORCH_CHECK(c->device() == like.device() && c->dim() == rank, name,
                  " must be on the values' device and have ", rank, " axes, got ", c->dim());
  out.dtype = dtype_of(*c, name);
  STD_TORCH_CHECK(out.dtype == DType::float32 || out.dtype == dtype, name,
                  " must be float32 or the values' dtype");
  out.data = c->data_ptr();
  for (int64_t i = 0; i < rank; ++i) {
    STD_TORCH_CHECK(c->size(i) == shape[i] || c->size(i) == 1, name, " axis ", i, " has size ", c->size(i),
                    ", takes 1 or ", shape[i]);
    out.stride[4 - rank + i] = c->size(i) == 1 ? 0 : c->stride(i);
  }
  return out;
}

inline std::vector<int64_t> shape_of(const torch::stable::Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

// `value` is any tensor of V's shape.
inline Coefficient read_coefficient(const std::optional<torch::stable::Tensor>& c, const char* name,
                                    double number, const torch::stable::Tensor& value, DType dtype) {
  return read_coefficient(c, name, number, value, shape_of(value), dtype);
}

// What follows the softmax of queries q, for an output of `dim_v` channels.
inline Epilogue read_epilogue(const std::optional<torch::stable::Tensor>& exclusive, double exclusive_value,
                              double exclusive_eps, const std::optional<torch::stable::Tensor>& out_gate,
                              const torch::stable::Tensor& q, int64_t dim_v, DType dtype) {
  std::vector<int64_t> shape = shape_of(q);
  shape.back() = dim_v;
  Epilogue e;
  e.gates = out_gate.has_value();
  e.gate = read_coefficient(out_gate, "out_gate", 1.0, q, shape, dtype);
  shape.back() = 1;
  e.excludes = exclusive.has_value() || exclusive_value != 0.0;
  e.exclusive = read_coefficient(exclusive, "exclusive", exclusive_value, q, shape, dtype);
  e.least = static_cast<float>(exclusive_eps * exclusive_eps);
  return e;
}

// A fresh contiguous tensor like `like`; NaN-filled under RESFORMER_POISON.
inline torch::stable::Tensor output(const torch::stable::Tensor& like, const std::vector<int64_t>& shape,
                                    torch::headeronly::ScalarType dtype) {
  torch::stable::Tensor t = torch::stable::new_empty(like, shape, dtype);
  if (poison_requested()) torch::stable::fill_(t, std::numeric_limits<double>::quiet_NaN());
  return t;
}

}  // namespace
}  // namespace resformer

// Shared by the op boundaries of this folder on every device: checks, and tensors as plain data.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "common/tensor_args.h"
#include "mix/mix.h"

namespace resformer::mix_host {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A tensor of shape (0,) stands for an absent one in a list: nothing else has one dimension.
inline bool absent(const Tensor& tensor) { return tensor.dim() == 1 && tensor.numel() == 0; }

inline std::optional<Tensor> present(const Tensor& tensor) {
  return absent(tensor) ? std::nullopt : std::optional<Tensor>(tensor);
}

inline Tensor absent_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, {0}); }

// A contiguous uninitialised tensor; NaN-filled under RESFORMER_POISON.
inline Tensor fresh(const Tensor& like, const std::vector<int64_t>& sizes) {
  return output(like, sizes, like.scalar_type());
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// V or its gradient: (batch, time, heads, dim), or packed (time, heads, dim).
inline MixShape shape_of(const Tensor& tensor, const char* name) {
  const int64_t rank = tensor.dim();
  STD_TORCH_CHECK(rank == 3 || rank == 4, name, " must have 3 or 4 dimensions, got ", rank);
  return {rank == 4 ? tensor.size(0) : 1, tensor.size(rank - 3), tensor.size(rank - 2),
          tensor.size(rank - 1)};
}

inline void check_rows(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1, name,
                  " must be contiguous in its last dimension, got stride ", tensor.stride(last));
}

inline void check_like(const Tensor& tensor, const Tensor& like, const char* name) {
  bool same = tensor.dim() == like.dim();
  for (int64_t i = 0; same && i < like.dim(); ++i) same = tensor.size(i) == like.size(i);
  STD_TORCH_CHECK(same, name, " must have the shape of the values it is mixed with");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, " must share one dtype");
  STD_TORCH_CHECK(tensor.device() == like.device(), name, " must be on one device");
}

inline MixSource rows_of(const Tensor& tensor) {
  const int64_t rank = tensor.dim();
  MixSource source;
  source.data = tensor.const_data_ptr();
  source.dtype = dtype_of(tensor, "values");
  source.stride[0] = rank == 4 ? tensor.stride(0) : 0;
  source.stride[1] = tensor.stride(rank - 3);
  source.stride[2] = tensor.stride(rank - 2);
  return source;
}

// Checked arguments of mix_values_forward.
inline std::vector<MixSource> forward_sources(const std::vector<Tensor>& values,
                                              const std::vector<Tensor>& coefficients,
                                              const std::vector<double>& numbers) {
  STD_TORCH_CHECK(!values.empty(), "values must hold at least one tensor");
  STD_TORCH_CHECK(coefficients.size() == values.size() && numbers.size() == values.size(),
                  "coefficients must hold ", values.size(), " entries, one for each of values");
  shape_of(values[0], "values");
  std::vector<MixSource> sources;
  for (size_t i = 0; i < values.size(); ++i) {
    check_like(values[i], values[0], "values");
    check_rows(values[i], "values");
    sources.push_back(rows_of(values[i]));
    sources.back().coefficient =
        read_coefficient(present(coefficients[i]), "coefficients", numbers[i], values[0], sources[i].dtype);
  }
  return sources;
}

// Checked arguments of mix_values_backward. A value is present only where the gradient of its coefficient is
// wanted.
inline std::vector<MixSource> backward_sources(const Tensor& grad, const std::vector<Tensor>& values,
                                               const std::vector<Tensor>& coefficients,
                                               const std::vector<double>& numbers,
                                               const std::vector<int64_t>& grad_mask) {
  const size_t n = values.size();
  STD_TORCH_CHECK(coefficients.size() == n && numbers.size() == n && grad_mask.size() == 2 * n,
                  "coefficients must hold ", n,
                  " entries, one for each of values, and grad_mask twice as many");
  shape_of(grad, "grad");
  check_rows(grad, "grad");
  std::vector<MixSource> sources;
  for (size_t i = 0; i < n; ++i) {
    const bool wanted = grad_mask[n + i] != 0;
    MixSource source;
    source.dtype = dtype_of(grad, "grad");
    if (wanted) {
      check_like(values[i], grad, "values");
      check_rows(values[i], "values");
      source = rows_of(values[i]);
    }
    STD_TORCH_CHECK(!(wanted && absent(coefficients[i])),
                    "grad_mask asks for the gradient of a coefficient that is no tensor");
    source.coefficient =
        read_coefficient(present(coefficients[i]), "coefficients", numbers[i], grad, source.dtype);
    sources.push_back(source);
  }
  return sources;
}

inline MixKept kept_of(const Tensor& coefficient) {
  const int64_t rank = coefficient.dim();
  return {rank == 4 && coefficient.size(0) > 1, coefficient.size(rank - 3) > 1,
          coefficient.size(rank - 2) > 1, coefficient.size(rank - 1) > 1};
}

}  // namespace resformer::mix_host

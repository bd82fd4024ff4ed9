// What the op boundaries in this folder share: checks, views of tensors as plain data, the choice of a build.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "common/cpu_features.h"
#include "common/tensor_args.h"
#include "mix/mix.h"

namespace resformer {

#define RESFORMER_DECLARE_MIX(isa) \
  namespace isa {                  \
  MixKernels mix_kernels();        \
  }
RESFORMER_DECLARE_MIX(portable)
RESFORMER_DECLARE_MIX(avx2)
RESFORMER_DECLARE_MIX(avx512)
RESFORMER_DECLARE_MIX(avx512_bf16)
#undef RESFORMER_DECLARE_MIX

namespace mix_host {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerThread = 32768;  // fewer are not worth waking another thread for

inline MixKernels current_kernels() {
  switch (current_isa()) {
#if defined(RESFORMER_HAVE_AVX2)
    case Isa::avx2:
      return avx2::mix_kernels();
#endif
#if defined(RESFORMER_HAVE_AVX512)
    case Isa::avx512:
      return avx512::mix_kernels();
#endif
#if defined(RESFORMER_HAVE_AVX512_BF16)
    case Isa::avx512_bf16:
      return avx512_bf16::mix_kernels();
#endif
    default:
      return portable::mix_kernels();
  }
}

// What stands for an absent tensor in a list: no value, coefficient or gradient has one dimension.
inline bool absent(const Tensor& tensor) { return tensor.dim() == 1 && tensor.numel() == 0; }

inline std::optional<Tensor> present(const Tensor& tensor) {
  return absent(tensor) ? std::nullopt : std::optional<Tensor>(tensor);
}

inline Tensor absent_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, {0}); }

// A fresh contiguous tensor; NaN-filled under RESFORMER_POISON, but for integers.
inline Tensor fresh(const Tensor& like, const std::vector<int64_t>& sizes) {
  return output(like, sizes, like.scalar_type());
}

// Bytes of 0xff read as NaN in float32 and float64.
template <class T>
inline std::vector<T> fresh_scratch(int64_t count) {
  std::vector<T> scratch(count);
  if (poison_requested()) std::memset(scratch.data(), 0xff, count * sizeof(T));
  return scratch;
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
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.size(last) == 1 || tensor.stride(last) == 1, name,
                  " must be contiguous in its last dimension, got stride ", tensor.stride(last));
}

inline void check_same_shape(const Tensor& tensor, const Tensor& like, const char* name) {
  bool same = tensor.dim() == like.dim();
  for (int64_t i = 0; same && i < like.dim(); ++i) same = tensor.size(i) == like.size(i);
  STD_TORCH_CHECK(same, name, " must have the shape of the values it is mixed with");
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

inline MixSource table_rows_of(const Tensor& table, const std::vector<int64_t>& rows) {
  MixSource source;
  source.data = table.const_data_ptr();
  source.dtype = dtype_of(table, "table");
  source.stride[0] = table.stride(0);
  source.stride[2] = table.stride(1);
  source.table_rows = rows.data();
  return source;
}

inline bool heads_join(const MixShape& shape, const MixSource& source) {
  const Coefficient& c = source.coefficient;
  const bool data = source.data == nullptr || source.stride[2] == shape.dim;
  return data && (c.data == nullptr || c.stride[2] == shape.dim * c.stride[3]);
}

// Longer rows cost less a row: (heads, dim) becomes one axis where every operand allows it.
inline bool can_join_heads(const MixShape& shape, const std::vector<MixSource>& sources) {
  if (shape.heads <= 1 || shape.dim <= 1) return false;
  return std::all_of(sources.begin(), sources.end(),
                     [&](const MixSource& s) { return heads_join(shape, s); });
}

inline void join_heads(MixShape* shape) {
  shape->dim *= shape->heads;
  shape->heads = 1;
}

inline int64_t rows_per_thread(const MixShape& shape) {
  return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, shape.heads * shape.dim));
}

inline Tensor run_forward(const Tensor& like, const std::vector<MixSource>& sources) {
  Tensor out = fresh(like, sizes_of(like));
  if (out.numel() == 0) return out;
  MixShape shape = shape_of(like, "values");
  if (can_join_heads(shape, sources)) join_heads(&shape);
  const MixForward f{dtype_of(like, "values"), shape, sources.data(), static_cast<int64_t>(sources.size()),
                     out.mutable_data_ptr()};
  const MixKernels kernels = current_kernels();
  torch::stable::parallel_for(0, shape.rows(), rows_per_thread(shape),
                              [&](int64_t begin, int64_t end) { kernels.forward(f, begin, end); });
  return out;
}

}  // namespace mix_host
}  // namespace resformer

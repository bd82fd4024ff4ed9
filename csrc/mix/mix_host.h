// Shared by the op boundaries on CPU tensors: scratch, kernels for this CPU, and the forward.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/dispatch.h"
#include "common/non_temporal.h"
#include "mix/mix_args.h"

namespace resformer {

RESFORMER_DISPATCH(MixKernels, mix_kernels)

namespace mix_host {

constexpr int64_t kElementsPerThread = 32768;  // fewer are not worth another thread

inline int64_t bytes_of(const Tensor& t) { return t.numel() * t.element_size(); }

// Bytes of 0xff read as NaN in float32 and float64.
template <class T>
inline std::vector<T> fresh_scratch(int64_t count) {
  std::vector<T> scratch(count);
  if (poison_requested()) std::memset(scratch.data(), 0xff, count * sizeof(T));
  return scratch;
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

inline int64_t rows_per_thread(const MixShape& shape) {
  return std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, shape.heads * shape.dim));
}

inline Tensor run_forward(const Tensor& like, const std::vector<MixSource>& sources) {
  Tensor out = fresh(like, sizes_of(like));
  if (out.numel() == 0) return out;
  MixShape shape = shape_of(like, "values");
  if (heads_join(shape, sources.data(), static_cast<int64_t>(sources.size()))) {
    shape = with_heads_joined(shape);
  }
  const MixForward f{dtype_of(like, "values"), shape,
                     sources.data(),           static_cast<int64_t>(sources.size()),
                     out.mutable_data_ptr(),   bytes_of(out) >= kNonTemporalBytes};
  const MixKernels& kernels = current_mix_kernels();
  torch::stable::parallel_for(0, shape.rows(), rows_per_thread(shape),
                              [&](int64_t begin, int64_t end) { kernels.forward(f, begin, end); });
  return out;
}

}  // namespace mix_host
}  // namespace resformer

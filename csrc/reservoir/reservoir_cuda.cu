// resformer::reservoir_scan_forward and _adjoint on CUDA tensors, for dense and grouped weights that fit on
// the chip. Both are sequential: `mode` and `tolerance` change nothing. The arithmetic is in
// reservoir_cuda.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/tensor_args.h"
#include "reservoir/reservoir_cuda.h"

namespace resformer {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ReservoirMatrix matrix_of(const Tensor& t, const Tensor& like, const char* name, bool transposed) {
  const int64_t rank = t.dim();
  STD_TORCH_CHECK(t.device() == like.device(), name, " must be on the inputs' device");
  const DType dtype = dtype_of(t, name);
  STD_TORCH_CHECK(dtype != DType::float16, name, " must be float32 or bfloat16");
  ReservoirMatrix m{dtype,
                    t.const_data_ptr(),
                    rank == 3 ? t.stride(0) : 0,
                    t.stride(rank - 2),
                    t.stride(rank - 1),
                    t.size(rank - 1)};
  if (transposed) std::swap(m.unit_stride, m.k_stride);
  return m;
}

const float* floats_of(const Tensor& t, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(t.device() == like.device() && t.scalar_type() == ScalarType::Float, name,
                  " must be float32, on the inputs' device");
  return static_cast<const float*>(t.const_data_ptr());
}

void read_vector(const Tensor& t, const Tensor& like, const char* name, int64_t units, const float** data,
                 int64_t* stride) {
  *data = floats_of(t, like, name);
  STD_TORCH_CHECK(t.dim() == 0 || (t.dim() == 1 && t.size(0) == units), name, " must be () or (", units,
                  ",)");
  *stride = t.dim() == 0 ? 0 : t.stride(0);
}

void read_inputs(const Tensor& t, const char* name, const std::optional<Tensor>& cu_seqlens, Recurrence* r) {
  const int64_t rank = t.dim();
  STD_TORCH_CHECK(rank == (cu_seqlens ? 2 : 3), name, " must have ", cu_seqlens ? 2 : 3, " axes, got ", rank);
  STD_TORCH_CHECK(t.numel() == 0 || t.size(rank - 1) == 1 || t.stride(rank - 1) == 1, name,
                  " must be contiguous in its last axis, got stride ", t.stride(rank - 1));
  r->inputs = floats_of(t, t, name);
  r->input_step = t.stride(rank - 2);
  r->total = t.size(0);
  if (!cu_seqlens) {
    r->input_batch = t.stride(0);
    r->sequences = t.size(0);
    r->time = t.size(1);
    r->total = t.size(0) * t.size(1);
    return;
  }
  STD_TORCH_CHECK(cu_seqlens->device() == t.device() && cu_seqlens->dim() == 1 && cu_seqlens->numel() >= 1 &&
                      cu_seqlens->is_contiguous() && cu_seqlens->scalar_type() == ScalarType::Int,
                  "cu_seqlens must be a contiguous 1-D int32 tensor on the inputs' device");
  r->offsets = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
  r->sequences = cu_seqlens->numel() - 1;
}

void read_weight(const Tensor& weight, const Tensor& like, bool transposed, Recurrence* r) {
  const int64_t rank = weight.dim();
  STD_TORCH_CHECK(
      (rank == 2 || rank == 3) && weight.size(rank - 2) == weight.size(rank - 1) && weight.numel() > 0,
      "weight must be (N, N) or (groups, n, n)");
  r->weight = matrix_of(weight, like, "weight", transposed);
  r->plan.size = weight.size(rank - 1);
  r->plan.groups = rank == 3 ? weight.size(0) : 1;
}

template <class E>
void launch(const Recurrence& r, cudaStream_t stream) {
  constexpr WarpTile one = kOneSequence, some = kSequences;
  const auto kernel = tile_of(r.plan).columns == one.columns ? recurrence_kernel<E, one.units, one.columns>
                                                             : recurrence_kernel<E, some.units, some.columns>;
  launch_together(kernel, r.plan.blocks(), kThreads, memory_of(r.plan).end, stream, r, "reservoir_scan");
}

void run(Recurrence r, const Tensor& like) {
  const Launch current(like);
  const DeviceLimits limits = device_limits();
  const int64_t groups = r.plan.groups, size = r.plan.size;
  const bool narrow = r.weight.dtype == DType::bfloat16;
  const int64_t inputs = r.input_weight.data == nullptr ? 0 : r.input_weight.k;
  STD_TORCH_CHECK(r.time < std::numeric_limits<int32_t>::max(), "too many steps: ", r.time);
  r.plan = plan_blocks(groups, size, inputs, r.sequences, narrow, limits.multiprocessors, limits.block_bytes);
  STD_TORCH_CHECK(r.plan.blocks() > 0, "W and the states of ", r.sequences, " sequences do not fit into ",
                  limits.multiprocessors, " times ", limits.block_bytes, " bytes of shared memory");
  // Zero is no step's number.
  const int64_t words = r.plan.split > 1 ? 2 * r.sequences * groups * size : 0;
  Tensor memory = torch::stable::new_zeros(like, {words}, ScalarType::Long);
  r.words = static_cast<uint64_t*>(memory.mutable_data_ptr());
  narrow ? launch<bf16>(r, current.stream()) : launch<float>(r, current.stream());
}

std::vector<int64_t> sizes_with(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = last;
  return sizes;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor inputs, Tensor weight, std::optional<Tensor> rows,
                                           std::optional<Tensor> columns, std::optional<Tensor> input_weight,
                                           Tensor leak, std::optional<Tensor> bias,
                                           std::optional<Tensor> initial_state, int64_t activation,
                                           int64_t mode, double tolerance, std::optional<Tensor> cu_seqlens) {
  STD_TORCH_CHECK(!rows && !columns, "CUDA kernels take dense and grouped weights alone");
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, "activation must be 0 to 4, got ", activation);
  Recurrence r{};
  read_weight(weight, inputs, false, &r);
  read_inputs(inputs, "inputs", cu_seqlens, &r);
  const int64_t units = r.units(), last = inputs.dim() - 1;
  r.activation = static_cast<Activation>(activation);
  read_vector(leak, inputs, "leak", units, &r.leak, &r.leak_stride);
  if (bias) read_vector(*bias, inputs, "bias", units, &r.bias, &r.bias_stride);
  STD_TORCH_CHECK(input_weight || inputs.size(last) == units, "inputs must have ", units, " units, got ",
                  inputs.size(last));
  if (input_weight) {
    STD_TORCH_CHECK(input_weight->dim() == 2 && input_weight->size(0) == units &&
                        input_weight->size(1) == inputs.size(last),
                    "input_weight must be (", units, ", ", inputs.size(last), ")");
    r.input_weight = matrix_of(*input_weight, inputs, "input_weight", false);
  }
  if (initial_state) {
    STD_TORCH_CHECK(initial_state->dim() == 2 && initial_state->size(0) == r.sequences &&
                        initial_state->size(1) == units && initial_state->is_contiguous(),
                    "initial_state must be a contiguous (", r.sequences, ", ", units, ")");
    r.start = floats_of(*initial_state, inputs, "initial_state");
  }
  Tensor states = output(inputs, sizes_with(inputs, units), ScalarType::Float);
  Tensor final_state = output(inputs, {r.sequences, units}, ScalarType::Float);
  Tensor info = output(inputs, {5}, ScalarType::Double);
  r.states = static_cast<float*>(states.mutable_data_ptr());
  r.final_state = static_cast<float*>(final_state.mutable_data_ptr());
  r.info = static_cast<double*>(info.mutable_data_ptr());
  run(r, inputs);
  return {states, final_state, info};
}

std::tuple<Tensor, Tensor> adjoint(Tensor grad, Tensor slope, Tensor weight, std::optional<Tensor> rows,
                                   std::optional<Tensor> columns, Tensor leak, int64_t mode, Tensor tolerance,
                                   std::optional<Tensor> cu_seqlens) {
  STD_TORCH_CHECK(!rows && !columns, "CUDA kernels take dense and grouped weights alone");
  Recurrence r{};
  read_weight(weight, grad, true, &r);
  read_inputs(grad, "grad", cu_seqlens, &r);
  const int64_t units = r.units();
  bool same = slope.dim() == grad.dim() && slope.is_contiguous() && grad.size(grad.dim() - 1) == units;
  for (int64_t i = 0; same && i < grad.dim(); ++i) same = slope.size(i) == grad.size(i);
  STD_TORCH_CHECK(same, "grad and slope must be (..., ", units, "), slope contiguous");
  r.gains = floats_of(slope, grad, "slope");
  read_vector(leak, grad, "leak", units, &r.leak, &r.leak_stride);
  Tensor result = output(grad, sizes_with(grad, units), ScalarType::Float);
  Tensor info = output(grad, {5}, ScalarType::Double);
  r.states = static_cast<float*>(result.mutable_data_ptr());
  r.info = static_cast<double*>(info.mutable_data_ptr());
  run(r, grad);
  return {result, info};
}

}  // namespace
}  // namespace resformer

STABLE_TORCH_LIBRARY_IMPL(resformer, CUDA, m) {
  m.impl("reservoir_scan_forward", TORCH_BOX(&resformer::forward));
  m.impl("reservoir_scan_adjoint", TORCH_BOX(&resformer::adjoint));
}

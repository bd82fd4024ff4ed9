// resformer::reservoir_scan_forward and _adjoint on CPU tensors. The arithmetic is in reservoir_cpu_isa.cpp,
// the chunks and sweeps in reservoir_plan.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "common/dispatch.h"
#include "reservoir/reservoir_args.h"

namespace resformer {

RESFORMER_DISPATCH(ReservoirKernels, reservoir_kernels)

namespace reservoir_host {
namespace {

Tensor info_tensor(const Tensor& like, const Report& report) {
  Tensor info = torch::stable::new_empty(like, {5}, ScalarType::Double);
  double* out = static_cast<double*>(info.mutable_data_ptr());
  out[0] = static_cast<double>(report.chunks);
  out[1] = static_cast<double>(report.sweeps);
  out[2] = report.mismatch;
  out[3] = report.steps > 0 ? static_cast<double>(report.work) / report.steps : 1.0;
  out[4] = report.forgot ? 1.0 : 0.0;
  return info;
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor inputs, Tensor weight, std::optional<Tensor> rows,
                                           std::optional<Tensor> columns, std::optional<Tensor> input_weight,
                                           Tensor leak, std::optional<Tensor> bias,
                                           std::optional<Tensor> initial_state, int64_t activation,
                                           int64_t mode, double tolerance, std::optional<Tensor> cu_seqlens) {
  const ReservoirKernels& kernels = current_reservoir_kernels();
  const WeightArgs w = read_weight(weight, rows, columns);
  const ReservoirLayout& layout = w.layout;
  STD_TORCH_CHECK(activation >= 0 && activation <= 4, "activation must be 0 to 4, got ", activation);
  Streams streams = read_streams(inputs, "inputs", cu_seqlens);
  const int64_t last = inputs.dim() - 1, count = static_cast<int64_t>(streams.sequences.size());
  Tensor states = states_like(inputs, layout.units(), streams, cu_seqlens.has_value());
  Tensor final_state = output(inputs, {count, layout.units()}, ScalarType::Float);

  Prepared prepared(kernels, w, false);
  ReservoirStep& step = prepared.step;
  step.activation = static_cast<Activation>(activation);
  step.relative = true;
  prepared.set_leak(leak);
  if (bias) prepared.set_bias(*bias);
  if (input_weight) {
    prepared.set_input_weight(*input_weight, inputs.size(last));
  } else {
    STD_TORCH_CHECK(inputs.size(last) == layout.units(), "inputs must have ", layout.units(), " units, got ",
                    inputs.size(last));
  }
  if (initial_state) check_states(*initial_state, "initial_state", count, layout.units());
  Sweeper sweeper(kernels, step, streams, chunks_of(streams.sequences, checked_mode(mode), w.pays()),
                  static_cast<float>(tolerance), prepared.work_per_step(), prepared.weight_bytes());
  for (int64_t c = 0; initial_state && c < sweeper.count(); ++c) {
    if (!sweeper.is_first(c)) continue;
    const int64_t at = sweeper.chunks()[c].sequence * layout.units();
    pad(layout, static_cast<const float*>(initial_state->const_data_ptr()) + at, sweeper.start(c));
  }
  const Report report = sweeper.run();

  float* out = static_cast<float*>(final_state.mutable_data_ptr());
  std::fill(out, out + count * layout.units(), 0.0f);
  if (initial_state)
    std::memcpy(out, initial_state->const_data_ptr(), count * layout.units() * sizeof(float));
  for (int64_t c = 0; c < sweeper.count(); ++c) {
    const int64_t s = sweeper.chunks()[c].sequence;
    if (c + 1 == sweeper.count() || sweeper.is_first(c + 1))
      unpad(layout, sweeper.end(c), out + s * layout.units());
  }
  return {states, final_state, info_tensor(inputs, report)};
}

std::tuple<Tensor, Tensor> adjoint(Tensor grad, Tensor slope, Tensor weight, std::optional<Tensor> rows,
                                   std::optional<Tensor> columns, Tensor leak, int64_t mode, Tensor tolerance,
                                   std::optional<Tensor> cu_seqlens) {
  const ReservoirKernels& kernels = current_reservoir_kernels();
  const WeightArgs w = transposed(read_weight(weight, rows, columns));
  const ReservoirLayout& layout = w.layout;
  Streams streams = read_streams(grad, "grad", cu_seqlens);
  bool same = slope.dim() == grad.dim() && slope.is_contiguous() && slope.scalar_type() == ScalarType::Float;
  for (int64_t i = 0; same && i < grad.dim(); ++i) same = slope.size(i) == grad.size(i);
  STD_TORCH_CHECK(same && grad.size(grad.dim() - 1) == layout.units(), "grad and slope must be (..., ",
                  layout.units(), "), slope contiguous and float32");
  STD_TORCH_CHECK(
      tolerance.is_cpu() && tolerance.numel() == 1 && tolerance.scalar_type() == ScalarType::Double,
      "tolerance must be one float64 on the CPU");
  Tensor result = states_like(grad, layout.units(), streams, cu_seqlens.has_value());
  streams.gain = static_cast<const float*>(slope.const_data_ptr());
  streams.reverse = true;

  Prepared prepared(kernels, w, true);
  prepared.step.activation = Activation::identity;
  prepared.step.relative = false;
  prepared.set_leak(leak);
  Sweeper sweeper(kernels, prepared.step, streams, chunks_of(streams.sequences, checked_mode(mode), w.pays()),
                  static_cast<float>(*static_cast<const double*>(tolerance.const_data_ptr())),
                  prepared.work_per_step(), prepared.weight_bytes());
  const Report report = sweeper.run();
  return {result, info_tensor(grad, report)};
}

}  // namespace
}  // namespace reservoir_host
}  // namespace resformer

STABLE_TORCH_LIBRARY_IMPL(resformer, CPU, m) {
  m.impl("reservoir_scan_forward", TORCH_BOX(&resformer::reservoir_host::forward));
  m.impl("reservoir_scan_adjoint", TORCH_BOX(&resformer::reservoir_host::adjoint));
}

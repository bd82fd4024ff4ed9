// resformer::mix_values_* on CPU tensors. The arithmetic is in mix_cpu_isa.cpp.
#include <torch/csrc/stable/library.h>

#include "mix/mix_gradients.h"

namespace resformer::mix_host {
namespace {

Tensor mix_values_forward(std::vector<Tensor> values, std::vector<Tensor> coefficients,
                          std::vector<double> coefficient_values) {
  return run_forward(values[0], forward_sources(values, coefficients, coefficient_values));
}

// Returns every dV_i, then every dc_i; those not in grad_mask are absent. A value may be absent where its
// coefficient's gradient is not wanted.
std::vector<Tensor> mix_values_backward(Tensor grad, std::vector<Tensor> values,
                                        std::vector<Tensor> coefficients,
                                        std::vector<double> coefficient_values,
                                        std::vector<int64_t> grad_mask) {
  const size_t n = values.size();
  BackwardRun run(grad, backward_sources(grad, values, coefficients, coefficient_values, grad_mask));
  std::vector<Tensor> results;
  for (size_t i = 0; i < n; ++i) {
    const bool wanted = grad_mask[i] != 0;
    results.push_back(wanted ? fresh(grad, sizes_of(grad)) : absent_like(grad));
    if (wanted) run.want_value(i, results.back());
    if (grad_mask[n + i] != 0) run.want_coefficient(i, coefficients[i]);
  }
  run.run();
  for (size_t i = 0; i < n; ++i) {
    results.push_back(grad_mask[n + i] != 0 ? run.coefficient_gradient(i) : absent_like(coefficients[i]));
  }
  return results;
}

}  // namespace
}  // namespace resformer::mix_host

STABLE_TORCH_LIBRARY_IMPL(resformer, CPU, m) {
  m.impl("mix_values_forward", TORCH_BOX(&resformer::mix_host::mix_values_forward));
  m.impl("mix_values_backward", TORCH_BOX(&resformer::mix_host::mix_values_backward));
}

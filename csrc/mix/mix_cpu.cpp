// resformer::mix_values_* on CPU tensors. The arithmetic is in mix_cpu_isa.cpp.
#include <torch/csrc/stable/library.h>

#include "mix/mix_gradients.h"

namespace resformer::mix_host {
namespace {

Tensor mix_values_forward(std::vector<Tensor> values, std::vector<Tensor> coefficients,
                          std::vector<double> coefficient_values) {
  STD_TORCH_CHECK(!values.empty(), "values must hold at least one tensor");
  STD_TORCH_CHECK(coefficients.size() == values.size() && coefficient_values.size() == values.size(),
                  "coefficients must hold ", values.size(), " entries, one for each of values");
  std::vector<MixSource> sources;
  for (size_t i = 0; i < values.size(); ++i) {
    check_same_shape(values[i], values[0], "values");
    shape_of(values[i], "values");
    check_rows(values[i], "values");
    STD_TORCH_CHECK(values[i].scalar_type() == values[0].scalar_type(), "values must share one dtype");
    sources.push_back(rows_of(values[i]));
    sources.back().coefficient = read_coefficient(present(coefficients[i]), "coefficients",
                                                  coefficient_values[i], values[0], sources[i].dtype);
  }
  return run_forward(values[0], sources);
}

// Returns every dV_i, then every dc_i; those not in grad_mask are absent. An entry of values may be absent
// where its coefficient's gradient is not wanted.
std::vector<Tensor> mix_values_backward(Tensor grad, std::vector<Tensor> values,
                                        std::vector<Tensor> coefficients,
                                        std::vector<double> coefficient_values,
                                        std::vector<int64_t> grad_mask) {
  const size_t n = values.size();
  STD_TORCH_CHECK(coefficients.size() == n && coefficient_values.size() == n && grad_mask.size() == 2 * n,
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
      check_same_shape(values[i], grad, "values");
      check_rows(values[i], "values");
      STD_TORCH_CHECK(values[i].scalar_type() == grad.scalar_type(), "values must have the dtype of grad");
      source = rows_of(values[i]);
    }
    STD_TORCH_CHECK(!(wanted && absent(coefficients[i])),
                    "grad_mask asks for the gradient of a coefficient that is no tensor");
    source.coefficient =
        read_coefficient(present(coefficients[i]), "coefficients", coefficient_values[i], grad, source.dtype);
    sources.push_back(source);
  }
  BackwardRun run(grad, std::move(sources));
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

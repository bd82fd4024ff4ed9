// resformer::mix_values_* on CUDA tensors. The arithmetic of a lane is in mix_lane.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/launch_cuda.h"
#include "mix/mix_args.h"
#include "mix/mix_lane.h"

namespace resformer {
namespace {

using mix_host::ScalarType;
using mix_host::Tensor;

constexpr int kMaxSources = 8;  // that fit into the arguments of a kernel

struct Operands {
  MixOperand operand[kMaxSources];

  __device__ const MixOperand& operator[](int64_t i) const { return operand[i]; }
};

struct Parts {
  MixPart part[kMaxSources];
};

template <class Sources>
struct Forward {
  MixForwardPlan plan;
  Sources sources;
  int64_t count;
  void* out;
};

template <class T, int V, class Sources>
__global__ void __launch_bounds__(kUnitThreads, 3)
    forward_kernel(const __grid_constant__ Forward<Sources> f) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kUnitThreads + threadIdx.x;
  const MixUnits& units = f.plan.units;
  const int64_t unit = thread >> units.lane_bits, lane = thread & (units.lanes() - 1);
  if (unit >= units.count()) return;
  forward_lane<T, V>(f.plan.shape, units, f.sources, f.count, static_cast<T*>(f.out), unit, lane);
}

__global__ void store_operands(const __grid_constant__ Operands operands, uint32_t count, MixOperand* to) {
  if (threadIdx.x < count) to[threadIdx.x] = operands.operand[threadIdx.x];
}

// Adjacent blocks serve the same rows of different sources, so that the gradient stays in the cache.
template <class T, int V, bool BY_ELEMENT>
__global__ void __launch_bounds__(kUnitThreads, BY_ELEMENT ? 2 : 3)
    backward_kernel(const __grid_constant__ Parts parts, uint32_t count) {
  const MixPart& p = parts.part[blockIdx.x % count];
  const int64_t thread = static_cast<int64_t>(blockIdx.x / count) * kUnitThreads + threadIdx.x;
  const int64_t unit = thread >> p.units.lane_bits, lane = thread & (p.units.lanes() - 1);
  const bool works = unit < p.units.count();
  const MixUnit u = works ? p.units.at(unit, p.shape) : MixUnit{};
  // Every lane of a warp runs every iteration: all of them take part in the shuffles.
  for (int64_t i = 0; i < p.units.groups_each; ++i) {
    const int64_t group = u.group_begin + i;
    const bool inside = works && group < u.group_end;
    double sum = inside ? backward_lane<T, V, BY_ELEMENT>(p, u, group, lane) : 0.0;
    if constexpr (!BY_ELEMENT) {
      if (p.gradient.coefficient == nullptr) continue;
      for (int width = 1 << p.units.lane_bits >> 1; width > 0; width >>= 1) {
        sum += __shfl_xor_sync(0xffffffffu, sum, width);
      }
      if (inside && lane == 0) p.store_sum(p.slot(group, u.head_begin, 0), sum);
    }
  }
}

// A block has 2^entry_bits entries, adjacent in memory, and splits the parts of each over its lanes.
__global__ void __launch_bounds__(kUnitThreads) sum_kernel(const __grid_constant__ MixSum s, int entry_bits) {
  __shared__ double sums[kUnitThreads];
  const int lanes = kUnitThreads >> entry_bits, lane = threadIdx.x >> entry_bits;
  const int64_t entry =
      (static_cast<int64_t>(blockIdx.x) << entry_bits) + (threadIdx.x & ((1 << entry_bits) - 1));
  const bool inside = entry < s.entries();
  sums[threadIdx.x] = inside ? sum_lane(s, entry, lane, lanes) : 0.0;
  for (uint32_t width = kUnitThreads >> 1; width >= 1u << entry_bits; width >>= 1) {
    __syncthreads();
    if (threadIdx.x < width) sums[threadIdx.x] += sums[threadIdx.x + width];
  }
  if (inside && lane == 0) store_as(s.dtype, s.out, entry, sums[threadIdx.x]);
}

uint32_t blocks_for(int64_t threads, int64_t per_source = 1) {
  const int64_t blocks = (threads + kUnitThreads - 1) / kUnitThreads * per_source;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "the tensors are too large for one launch: ", blocks,
                  " blocks");
  return static_cast<uint32_t>(blocks);
}

template <class Sources>
void launch_forward(DType dtype, const Forward<Sources>& f, cudaStream_t stream) {
  const uint32_t blocks = blocks_for(f.plan.units.count() << f.plan.units.lane_bits);
  const auto run = [&](auto wide, auto narrow) {
    if (f.plan.vectors) {
      wide<<<blocks, kUnitThreads, 0, stream>>>(f);
    } else {
      narrow<<<blocks, kUnitThreads, 0, stream>>>(f);
    }
  };
  if (dtype == DType::float32) {
    run(forward_kernel<float, kVector<float>, Sources>, forward_kernel<float, 1, Sources>);
  } else if (dtype == DType::bfloat16) {
    run(forward_kernel<bf16, kVector<bf16>, Sources>, forward_kernel<bf16, 1, Sources>);
  } else {
    run(forward_kernel<f16, kVector<f16>, Sources>, forward_kernel<f16, 1, Sources>);
  }
  check_cuda(cudaGetLastError(), "mix_values forward");
}

// Selects the kernel beside the dtype; all parts of a launch share it.
struct Kind {
  bool vectors = false, by_element = false;

  bool operator==(const Kind&) const = default;
};

template <class T>
void launch_backward(const Kind& kind, const Parts& parts, uint32_t count, cudaStream_t stream) {
  int64_t threads = 0;
  for (uint32_t i = 0; i < count; ++i) {
    threads = std::max(threads, parts.part[i].units.count() << parts.part[i].units.lane_bits);
  }
  const uint32_t blocks = blocks_for(threads, count);
  const auto run = [&](auto by_element, auto otherwise) {
    if (kind.by_element) {
      by_element<<<blocks, kUnitThreads, 0, stream>>>(parts, count);
    } else {
      otherwise<<<blocks, kUnitThreads, 0, stream>>>(parts, count);
    }
  };
  if (kind.vectors) {
    run(backward_kernel<T, kVector<T>, true>, backward_kernel<T, kVector<T>, false>);
  } else {
    run(backward_kernel<T, 1, true>, backward_kernel<T, 1, false>);
  }
  check_cuda(cudaGetLastError(), "mix_values backward");
}

void launch_sum(const MixSum& s, cudaStream_t stream) {
  const int64_t blocks = (s.entries() + (int64_t{1} << s.entry_bits()) - 1) >> s.entry_bits();
  sum_kernel<<<blocks_for(blocks * kUnitThreads), kUnitThreads, 0, stream>>>(s, s.entry_bits());
  check_cuda(cudaGetLastError(), "mix_values backward");
}

int64_t vector_of(const Tensor& tensor) { return 16 / static_cast<int64_t>(tensor.element_size()); }

// Copies the sources of a mix to the GPU as arguments of kernels, which a CUDA graph can record.
Tensor upload(const Tensor& like, const std::vector<MixOperand>& operands, cudaStream_t stream) {
  const int64_t bytes = static_cast<int64_t>(operands.size() * sizeof(MixOperand));
  Tensor memory = torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
  auto* to = static_cast<MixOperand*>(memory.mutable_data_ptr());
  for (size_t i = 0; i < operands.size(); i += kMaxSources) {
    const auto count = static_cast<uint32_t>(std::min<size_t>(kMaxSources, operands.size() - i));
    Operands some;
    std::copy_n(operands.begin() + i, count, some.operand);
    store_operands<<<1, 32, 0, stream>>>(some, count, to + i);
  }
  check_cuda(cudaGetLastError(), "mix_values forward");
  return memory;
}

Tensor mix_values_forward(std::vector<Tensor> values, std::vector<Tensor> coefficients,
                          std::vector<double> coefficient_values) {
  const std::vector<MixSource> sources = mix_host::forward_sources(values, coefficients, coefficient_values);
  Tensor out = mix_host::fresh(values[0], mix_host::sizes_of(values[0]));
  if (out.numel() == 0) return out;
  const auto count = static_cast<int64_t>(sources.size());
  const DType dtype = sources[0].dtype;
  const MixForwardPlan plan =
      plan_forward(mix_host::shape_of(out, "values"), sources.data(), count, vector_of(out));
  std::vector<MixOperand> operands;
  for (const MixSource& source : sources) operands.push_back(operand_of(source));
  const Launch launch(out);
  if (count <= kMaxSources) {
    Forward<Operands> f{plan, {}, count, out.mutable_data_ptr()};
    std::copy(operands.begin(), operands.end(), f.sources.operand);
    launch_forward(dtype, f, launch.stream());
  } else {
    const Tensor memory = upload(out, operands, launch.stream());
    const auto* uploaded = static_cast<const MixOperand*>(memory.const_data_ptr());
    const Forward<const MixOperand*> f{plan, uploaded, count, out.mutable_data_ptr()};
    launch_forward(dtype, f, launch.stream());
  }
  return out;
}

// One source's gradients and partial sums.
struct Gradients {
  MixPart part;
  Kind kind;
  Tensor coefficient;
  std::optional<Tensor> partials;
};

Gradients prepare(const Tensor& grad, const MixSource& source, const Tensor* value,
                  const Tensor* coefficient) {
  Gradients g;
  const MixKept kept = coefficient ? mix_host::kept_of(*coefficient) : MixKept{};
  g.part = plan_backward(mix_host::shape_of(grad, "grad"), mix_host::rows_of(grad), source, kept,
                         coefficient != nullptr, vector_of(grad), &g.kind.vectors);
  MixSourceGradient& to = g.part.gradient;
  if (value != nullptr) to.value = value->mutable_data_ptr();
  if (coefficient == nullptr) return g;
  g.kind.by_element = kept.dim;
  g.coefficient = mix_host::fresh(*coefficient, mix_host::sizes_of(*coefficient));
  to.coefficient_dtype = dtype_of(g.coefficient, "coefficients");
  if (to.reduction == MixReduction::time) {
    g.partials = output(grad, {g.part.units.groups * to.width}, ScalarType::Double);
  }
  to.coefficient = (g.partials ? *g.partials : g.coefficient).mutable_data_ptr();
  return g;
}

// Launches each kind separately, kMaxSources sources at a time.
template <class T>
void run_parts(const std::vector<Gradients>& all, cudaStream_t stream) {
  for (const Kind kind : {Kind{true, false}, Kind{true, true}, Kind{false, false}, Kind{false, true}}) {
    Parts parts;
    uint32_t count = 0;
    for (const Gradients& g : all) {
      const bool wanted = g.part.gradient.value != nullptr || g.part.gradient.coefficient != nullptr;
      if (g.kind == kind && wanted) parts.part[count++] = g.part;
      if (count == kMaxSources || (count > 0 && &g == &all.back())) {
        launch_backward<T>(kind, parts, count, stream);
        count = 0;
      }
    }
  }
}

void run_parts(DType dtype, const std::vector<Gradients>& all, cudaStream_t stream) {
  if (dtype == DType::float32) return run_parts<float>(all, stream);
  if (dtype == DType::bfloat16) return run_parts<bf16>(all, stream);
  run_parts<f16>(all, stream);
}

void sum_partials(const Gradients& g, cudaStream_t stream) {
  const auto* partials = static_cast<const double*>(g.partials->const_data_ptr());
  Tensor out = g.coefficient;
  launch_sum(sum_of(g.part, partials, g.part.gradient.coefficient_dtype, out.mutable_data_ptr()), stream);
}

std::vector<Tensor> mix_values_backward(Tensor grad, std::vector<Tensor> values,
                                        std::vector<Tensor> coefficients,
                                        std::vector<double> coefficient_values,
                                        std::vector<int64_t> grad_mask) {
  const std::vector<MixSource> sources =
      mix_host::backward_sources(grad, values, coefficients, coefficient_values, grad_mask);
  const size_t n = sources.size();
  std::vector<Tensor> results;
  for (size_t i = 0; i < n; ++i) {
    const bool wanted = grad_mask[i] != 0;
    results.push_back(wanted ? mix_host::fresh(grad, mix_host::sizes_of(grad)) : mix_host::absent_like(grad));
  }
  std::vector<Gradients> all;
  const bool empty = grad.numel() == 0;
  for (size_t i = 0; i < n && !empty; ++i) {
    all.push_back(prepare(grad, sources[i], grad_mask[i] != 0 ? &results[i] : nullptr,
                          grad_mask[n + i] != 0 ? &coefficients[i] : nullptr));
  }
  if (!empty) {
    const Launch launch(grad);
    run_parts(dtype_of(grad, "grad"), all, launch.stream());
    for (const Gradients& g : all) {
      if (g.partials) sum_partials(g, launch.stream());
    }
  }
  for (size_t i = 0; i < n; ++i) {
    if (grad_mask[n + i] == 0) {
      results.push_back(mix_host::absent_like(coefficients[i]));
    } else if (empty) {
      const std::vector<int64_t> sizes = mix_host::sizes_of(coefficients[i]);
      results.push_back(torch::stable::new_zeros(coefficients[i], {sizes.data(), sizes.size()}));
    } else {
      results.push_back(all[i].coefficient);
    }
  }
  return results;
}

}  // namespace
}  // namespace resformer

STABLE_TORCH_LIBRARY_IMPL(resformer, CUDA, m) {
  m.impl("mix_values_forward", TORCH_BOX(&resformer::mix_values_forward));
  m.impl("mix_values_backward", TORCH_BOX(&resformer::mix_values_backward));
}

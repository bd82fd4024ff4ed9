// The CUDA kernels of mix_values, lane by lane on a CPU: everything but the launches and the shuffles, whose
// order of addition is repeated here. Strides and shapes are those of the operator's boundary.
#include <vector>

#include "mix/mix_lane.h"

using namespace resformer;

namespace {

struct Operand {
  const void* data;  // null: absent
  int64_t dtype;     // of DType
  int64_t stride[4];
  double number;  // of a coefficient without data
};

MixSource source_of(const Operand& value, const Operand& coefficient) {
  MixSource s;
  s.data = value.data;
  s.dtype = static_cast<DType>(value.dtype);
  for (int i = 0; i < 3; ++i) s.stride[i] = value.stride[i];
  s.coefficient = {
      coefficient.data, static_cast<DType>(coefficient.dtype), static_cast<float>(coefficient.number), {}};
  for (int i = 0; i < 4; ++i) s.coefficient.stride[i] = coefficient.stride[i];
  return s;
}

template <class Run>
void by_dtype(int64_t dtype, const Run& run) {
  switch (static_cast<DType>(dtype)) {
    case DType::float32:
      return run(float{});
    case DType::bfloat16:
      return run(bf16{});
    case DType::float16:
      return run(f16{});
  }
}

template <class T, int V>
void forward(const MixForwardPlan& plan, const std::vector<MixOperand>& operands, T* out) {
  const auto count = static_cast<int64_t>(operands.size());
  for (int64_t unit = 0; unit < plan.units.count(); ++unit) {
    for (int64_t lane = 0; lane < plan.units.lanes(); ++lane) {
      forward_lane<T, V>(plan.shape, plan.units, operands.data(), count, out, unit, lane);
    }
  }
}

// As __shfl_xor_sync adds.
double sum_of_lanes(std::vector<double> lanes) {
  for (size_t width = lanes.size() / 2; width > 0; width /= 2) {
    std::vector<double> next(lanes);
    for (size_t i = 0; i < lanes.size(); ++i) next[i] = lanes[i] + lanes[i ^ width];
    lanes = next;
  }
  return lanes[0];
}

template <class T, int V, bool BY_ELEMENT>
void backward(const MixPart& p) {
  for (int64_t unit = 0; unit < p.units.count(); ++unit) {
    const MixUnit u = p.units.at(unit, p.shape);
    for (int64_t group = u.group_begin; group < u.group_end; ++group) {
      std::vector<double> sums(p.units.lanes());
      for (int64_t lane = 0; lane < p.units.lanes(); ++lane) {
        sums[lane] = backward_lane<T, V, BY_ELEMENT>(p, u, group, lane);
      }
      if (BY_ELEMENT || p.gradient.coefficient == nullptr) continue;
      p.store_sum(p.slot(group, u.head_begin, 0), sum_of_lanes(sums));
    }
  }
}

}  // namespace

extern "C" {

// 1 where 16 bytes are moved at once.
int mix_forward(const int64_t* shape, int64_t dtype, int64_t count, const Operand* values,
                const Operand* coefficients, void* out) {
  std::vector<MixSource> sources;
  for (int64_t i = 0; i < count; ++i) sources.push_back(source_of(values[i], coefficients[i]));
  const MixShape whole{shape[0], shape[1], shape[2], shape[3]};
  bool vectors = false;
  by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const MixForwardPlan plan = plan_forward(whole, sources.data(), count, kVector<T>);
    std::vector<MixOperand> operands;
    for (const MixSource& s : sources) operands.push_back(operand_of(s));
    vectors = plan.vectors;
    if (vectors) {
      forward<T, kVector<T>>(plan, operands, static_cast<T*>(out));
    } else {
      forward<T, 1>(plan, operands, static_cast<T*>(out));
    }
  });
  return vectors;
}

// `kept` has bits for batch, time, head and dim; `partials` room for as many float64 sums as `rows * width`.
int mix_backward(const int64_t* shape, int64_t dtype, const Operand* grad, const Operand* value,
                 const Operand* coefficient, void* d_value, void* d_coefficient, int64_t d_dtype,
                 int64_t kept, double* partials) {
  const MixShape whole{shape[0], shape[1], shape[2], shape[3]};
  const MixKept keeps{(kept & 1) != 0, (kept & 2) != 0, (kept & 4) != 0, (kept & 8) != 0};
  const Operand none{nullptr, dtype, {0, 0, 0, 0}, 1.0};
  bool vectors = false;
  by_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    MixPart p = plan_backward(whole, source_of(*grad, none), source_of(*value, *coefficient), keeps,
                              d_coefficient != nullptr, kVector<T>, &vectors);
    const bool partial = p.gradient.reduction == MixReduction::time;
    p.gradient.value = d_value;
    p.gradient.coefficient = d_coefficient == nullptr || !partial ? d_coefficient : partials;
    p.gradient.coefficient_dtype = static_cast<DType>(d_dtype);
    const bool by_element = d_coefficient != nullptr && keeps.dim;
    if (vectors) {
      by_element ? backward<T, kVector<T>, true>(p) : backward<T, kVector<T>, false>(p);
    } else {
      by_element ? backward<T, 1, true>(p) : backward<T, 1, false>(p);
    }
    if (d_coefficient == nullptr || !partial) return;
    const MixSum s = sum_of(p, partials, p.gradient.coefficient_dtype, d_coefficient);
    const int64_t lanes = kUnitThreads >> s.entry_bits();
    for (int64_t entry = 0; entry < s.entries(); ++entry) {
      std::vector<double> sums(lanes);
      for (int64_t lane = 0; lane < lanes; ++lane) sums[lane] = sum_lane(s, entry, lane, lanes);
      store_as(s.dtype, s.out, entry, sum_of_lanes(sums));
    }
  });
  return vectors;
}
}

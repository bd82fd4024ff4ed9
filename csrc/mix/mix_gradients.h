// Gradients of the sources and coefficients of one mix, for both ops.
#pragma once

#include <optional>
#include <utility>

#include "mix/mix_host.h"

namespace resformer::mix_host {

constexpr int64_t kBlocks = 256;

// A coefficient's gradient, and the partial sums that the kernel writes for it.
struct CoefficientGradient {
  Tensor out;
  MixKept kept;
  int64_t width = 1;
  std::vector<float> by_row;
  std::vector<double> by_block;
};

inline CoefficientGradient gradient_like(const Tensor& coefficient) {
  const int64_t rank = coefficient.dim();
  CoefficientGradient g;
  g.out = fresh(coefficient, sizes_of(coefficient));
  g.kept = kept_of(coefficient);
  g.width = coefficient.size(rank - 2) * coefficient.size(rank - 1);
  return g;
}

// partials is (groups, parts, width), or (parts, groups, width) with `parts_first`: summed over parts, in
// order.
template <class Partial>
void sum_parts(const Partial* partials, int64_t groups, int64_t parts, int64_t width, bool parts_first,
               const Tensor& out) {
  const DType dtype = dtype_of(out, "coefficients");
  void* data = out.mutable_data_ptr();
  torch::stable::parallel_for(0, groups * width, kElementsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / width, j = i % width;
      double sum = 0.0;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t slot = parts_first ? part * groups + group : group * parts + part;
        sum += partials[slot * width + j];
      }
      store_as(dtype, data, i, sum);
    }
  });
}

// Blocks of rows, each large enough for a thread.
inline MixBlocks blocks_of(const MixShape& shape, bool within_batch) {
  return MixBlocks::split(shape, within_batch, rows_per_thread(shape), kBlocks);
}

class BackwardRun {
 public:
  BackwardRun(const Tensor& grad, std::vector<MixSource> sources)
      : shape_(shape_of(grad, "grad")),
        dtype_(dtype_of(grad, "grad")),
        grad_(rows_of(grad)),
        sources_(std::move(sources)),
        values_(sources_.size()),
        wanted_(sources_.size()) {}

  void want_value(size_t i, const Tensor& out) { values_[i] = out; }
  void want_coefficient(size_t i, const Tensor& coefficient) { wanted_[i] = gradient_like(coefficient); }
  Tensor coefficient_gradient(size_t i) const { return wanted_[i]->out; }

  void run() {
    if (shape_.rows() * shape_.heads * shape_.dim == 0) return zero_coefficients();
    const bool within_batch = std::any_of(wanted_.begin(), wanted_.end(), [&](const auto& g) {
      return g && g->kept.batch && reduction_of(g->kept, shape_) == MixReduction::time;
    });
    const MixBlocks blocks = blocks_of(shape_, within_batch);
    const MixShape shape = kernel_shape();
    const std::vector<MixSourceGradient> gradients = prepare(blocks);
    int64_t bytes = 0;
    for (const auto& value : values_) bytes += value ? bytes_of(*value) : 0;
    const MixBackward m{dtype_,
                        shape,
                        grad_,
                        sources_.data(),
                        gradients.data(),
                        static_cast<int64_t>(sources_.size()),
                        bytes >= kNonTemporalBytes};
    const MixKernels& kernels = current_mix_kernels();
    std::vector<double> accumulators(blocks.count() * accumulators_);
    torch::stable::parallel_for(0, blocks.count(), 1, [&](int64_t begin, int64_t end) {
      double* own = accumulators.data() + begin * accumulators_;
      for (int64_t i = begin; i < end; ++i) kernels.backward(m, blocks.begin(i), blocks.end(i), i, own);
    });
    for (auto& g : wanted_) {
      if (g) finish(*g, blocks);
    }
  }

 private:
  void zero_coefficients() {
    for (auto& g : wanted_) {
      if (g && g->out.numel() > 0) {
        std::memset(g->out.mutable_data_ptr(), 0, g->out.numel() * g->out.element_size());
      }
    }
  }

  MixShape kernel_shape() const {
    std::vector<MixSource> operands = sources_;
    operands.push_back(grad_);
    const bool alike = std::all_of(wanted_.begin(), wanted_.end(),
                                   [](const auto& g) { return !g || g->kept.head == g->kept.dim; });
    const bool join = alike && heads_join(shape_, operands.data(), static_cast<int64_t>(operands.size()));
    return join ? with_heads_joined(shape_) : shape_;
  }

  std::vector<MixSourceGradient> prepare(const MixBlocks& blocks) {
    std::vector<MixSourceGradient> gradients(sources_.size());
    for (size_t i = 0; i < sources_.size(); ++i) {
      MixSourceGradient& to = gradients[i];
      if (values_[i]) to.value = values_[i]->mutable_data_ptr();
      if (!wanted_[i]) continue;
      CoefficientGradient& g = *wanted_[i];
      to.reduction = reduction_of(g.kept, shape_);
      to.keeps_head = g.kept.head;
      to.keeps_dim = g.kept.dim;
      to.width = g.width;
      if (to.reduction == MixReduction::time) {
        g.by_block = fresh_scratch<double>(blocks.count() * g.width);
        to.coefficient = g.by_block.data();
        continue;
      }
      if (!to.elementwise(shape_)) {
        to.accumulator = accumulators_;
        accumulators_ += g.width;
      }
      if (to.reduction == MixReduction::batch) {
        g.by_row = fresh_scratch<float>(shape_.rows() * g.width);
        to.coefficient = g.by_row.data();
      } else {
        to.coefficient = g.out.mutable_data_ptr();
        to.coefficient_dtype = dtype_of(g.out, "coefficients");
      }
    }
    return gradients;
  }

  void finish(const CoefficientGradient& g, const MixBlocks& blocks) const {
    const MixReduction reduction = reduction_of(g.kept, shape_);
    if (reduction == MixReduction::batch) {
      sum_parts(g.by_row.data(), shape_.time, shape_.batch, g.width, true, g.out);
    } else if (reduction == MixReduction::time) {
      const int64_t groups = g.kept.batch ? shape_.batch : 1;
      sum_parts(g.by_block.data(), groups, blocks.count() / groups, g.width, false, g.out);
    }
  }

  MixShape shape_;
  DType dtype_;
  MixSource grad_;
  std::vector<MixSource> sources_;
  std::vector<std::optional<Tensor>> values_;
  std::vector<std::optional<CoefficientGradient>> wanted_;
  int64_t accumulators_ = 0;
};

}  // namespace resformer::mix_host

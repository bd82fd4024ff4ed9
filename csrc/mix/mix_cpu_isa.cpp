// Mix kernels for one instruction set. They are bound by memory: each operand is read once, in order, and no
// temporary has V's size.
#include "mix/row_tiles.h"

namespace resformer::RESFORMER_ISA {
namespace {

// out = [sum +] a x [+ b y]. `sum` and y may be null; out is T for the last sources, else float.
template <bool STREAM, class X, class Y, class Out>
void add_tile(const float* sum, Weights a, Operand<X> x, Weights b, Operand<Y> y, int64_t n, Out* out) {
  const Vec a_all = set1(a.weight), b_all = set1(b.weight);
  for_vectors<STREAM>(n, [&](int64_t d, auto get, auto put) __attribute__((always_inline)) {
    x.prefetch(d);
    const Vec wa = a.weights ? get(a.weights + d) : a_all;
    Vec total = sum ? fma(wa, get(x.now + d), get(sum + d)) : mul(wa, get(x.now + d));
    if (y.now) {
      y.prefetch(d);
      total = fma(b.weights ? get(b.weights + d) : b_all, get(y.now + d), total);
    }
    put(out + d, total);
  });
}

// `streams`: with non-temporal stores where out's address allows them.
template <class X, class Y, class Out>
void add_sources(const float* sum, Weights a, Operand<X> x, Weights b, Operand<Y> y, int64_t n, Out* out,
                 bool streams) {
  if (streams && may_stream(out)) return add_tile<true>(sum, a, x, b, y, n, out);
  add_tile<false>(sum, a, x, b, y, n, out);
}

template <class T, class Last>
void mix_tile(const MixForward& f, const Position& p, T* out) {
  const Operand<T> none{nullptr, nullptr};
  float sum[kTile], buffer_a[kTile], buffer_b[kTile];
  const MixSource* s = f.sources;
  const int64_t pairs_from = f.count % 2;
  if (pairs_from == 1) {
    const Weights a = coefficients_of(s[0], p, buffer_a);
    const Operand<T> x = operand_at<T>(s[0], p);
    if (f.count == 1) return add_sources(nullptr, a, x, Weights{}, none, p.n, out, f.stream);
    add_sources(nullptr, a, x, Weights{}, none, p.n, sum, false);
  }
  for (int64_t i = pairs_from; i < f.count; i += 2) {
    const Weights a = coefficients_of(s[i], p, buffer_a), b = coefficients_of(s[i + 1], p, buffer_b);
    const float* so_far = i == 0 ? nullptr : sum;
    const Operand<T> x = operand_at<T>(s[i], p);
    if (i + 2 == f.count) {
      add_sources(so_far, a, x, b, operand_at<Last>(s[i + 1], p), p.n, out, f.stream);
    } else {
      add_sources(so_far, a, x, b, operand_at<T>(s[i + 1], p), p.n, sum, false);
    }
  }
}

template <class T, class Last>
void forward_rows(const MixForward& f, int64_t begin, int64_t end) {
  T* out = static_cast<T*>(f.out);
  for (int64_t row = begin; row < end; ++row) {
    for_tiles<T>(f.shape, row, [&](const Position& p) {
      mix_tile<T, Last>(f, p, out + (row * f.shape.heads + p.h) * f.shape.dim + p.d);
    });
  }
}

// Sources have the result's dtype, except that the last may be a float32 table.
template <class T>
void forward_as(const MixForward& f, int64_t begin, int64_t end) {
  if (f.sources[f.count - 1].dtype == f.dtype) return forward_rows<T, T>(f, begin, end);
  forward_rows<T, float>(f, begin, end);
}

typedef double VecDouble __attribute__((vector_size(sizeof(Vec))));
typedef float VecHalf __attribute__((vector_size(sizeof(Vec) / 2)));
constexpr int64_t kDoubles = kLanes / 2;

VecDouble load_double(const float* p) {
  VecHalf x;
  memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(x, VecDouble);
}

// Products of float32 are exact in float64, so a sum that cancels keeps its digits.
double dot(const float* grad, Operand<float> operand, int64_t n) {
  const float* const x = operand.now;
  VecDouble lanes[2] = {};
  double sum = 0.0;
  int64_t d = 0;
  for (; d + 2 * kDoubles <= n; d += 2 * kDoubles) {
    operand.prefetch(d);
    lanes[0] += load_double(grad + d) * load_double(x + d);
    lanes[1] += load_double(grad + d + kDoubles) * load_double(x + d + kDoubles);
  }
  for (; d < n; ++d) sum += static_cast<double>(grad[d]) * x[d];
  for (int64_t i = 0; i < kDoubles; ++i) sum += lanes[0][i] + lanes[1][i];
  return sum;
}

// Products of 16-bit numbers are exact in float32, and a row's sum of them is far finer than their dtype.
template <class T, class X>
double dot(const T* grad, Operand<X> x, int64_t n) {
  Vec lanes = zero();
  for_vectors(n, [&](int64_t d, auto get, auto) __attribute__((always_inline)) {
    x.prefetch(d);
    lanes = fma(get(grad + d), get(x.now + d), lanes);
  });
  return reduce_add(lanes);
}

void add_products(const float* grad, const float* x, int64_t n, double* sums) {
  for (int64_t d = 0; d < n; ++d) sums[d] += static_cast<double>(grad[d]) * x[d];
}

template <class T, class X>
void add_products(const T* grad, const X* x, int64_t n, double* sums) {
  float products[kTile];
  for_vectors(n, [&](int64_t d, auto get, auto put) { put(products + d, mul(get(grad + d), get(x + d))); });
  for (int64_t d = 0; d < n; ++d) sums[d] += products[d];
}

template <class T, class X, class C>
void write_products(const T* grad, const X* x, int64_t n, C* out) {
  for_vectors(n, [&](int64_t d, auto get, auto put) { put(out + d, mul(get(grad + d), get(x + d))); });
}

template <class T, class X>
void coefficient_gradient(const MixShape& shape, const MixSourceGradient& g, const Position& p, const T* grad,
                          Operand<X> x, double* sums) {
  if (g.elementwise(shape)) {
    const int64_t at = (p.now.row * shape.heads + p.h) * shape.dim + p.d;
    if (g.coefficient_dtype == DType::float32) {
      write_products(grad, x.now, p.n, static_cast<float*>(g.coefficient) + at);
    } else {
      write_products(grad, x.now, p.n, static_cast<T*>(g.coefficient) + at);
    }
    return;
  }
  const int64_t h = g.keeps_head ? p.h : 0;
  if (g.keeps_dim) {
    add_products(grad, x.now, p.n, sums + h * shape.dim + p.d);
  } else {
    sums[h] += dot(grad, x, p.n);
  }
}

template <class T, class X>
void source_gradient(const MixBackward& m, int64_t i, const Position& p, double* sums) {
  const MixSourceGradient& g = m.gradients[i];
  const Operand<T> grad = operand_at<T>(m.grad, p), none{nullptr, nullptr};
  if (g.value != nullptr) {
    float buffer[kTile];
    const Weights c = coefficients_of(m.sources[i], p, buffer);
    T* out = static_cast<T*>(g.value) + (p.now.row * m.shape.heads + p.h) * m.shape.dim + p.d;
    const Operand<T> x = i == 0 ? grad : cached(grad.now);
    add_sources(nullptr, c, x, Weights{}, none, p.n, out, m.stream);
  }
  if (g.coefficient == nullptr) return;
  coefficient_gradient(m.shape, g, p, grad.now, operand_at<X>(m.sources[i], p), sums);
}

// Float64 sums: a coefficient's gradient may add up every element of V.
template <class T>
double* sums_of(const MixSourceGradient& g, int64_t block, double* accumulators) {
  if (g.reduction == MixReduction::time) return static_cast<double*>(g.coefficient) + block * g.width;
  return accumulators + g.accumulator;
}

template <class T>
void write_row_sums(const MixSourceGradient& g, int64_t row, const double* sums) {
  if (g.coefficient_dtype == DType::float32) {
    float* out = static_cast<float*>(g.coefficient) + row * g.width;
    for (int64_t i = 0; i < g.width; ++i) out[i] = static_cast<float>(sums[i]);
  } else {
    T* out = static_cast<T*>(g.coefficient) + row * g.width;
    for (int64_t i = 0; i < g.width; ++i) out[i] = from_float<T>(static_cast<float>(sums[i]));
  }
}

template <class T>
void backward_rows(const MixBackward& m, int64_t begin, int64_t end, int64_t block, double* accumulators) {
  const auto clear = [&](bool over_time) {
    for (int64_t i = 0; i < m.count; ++i) {
      const MixSourceGradient& g = m.gradients[i];
      if (g.coefficient == nullptr || (g.reduction == MixReduction::time) != over_time ||
          g.elementwise(m.shape)) {
        continue;
      }
      double* sums = sums_of<T>(g, block, accumulators);
      for (int64_t j = 0; j < g.width; ++j) sums[j] = 0.0;
    }
  };
  clear(true);
  for (int64_t row = begin; row < end; ++row) {
    clear(false);
    for_tiles<T>(m.shape, row, [&](const Position& p) {
      for (int64_t i = 0; i < m.count; ++i) {
        double* sums = sums_of<T>(m.gradients[i], block, accumulators);
        if (m.sources[i].dtype == m.dtype) {
          source_gradient<T, T>(m, i, p, sums);
        } else {
          source_gradient<T, float>(m, i, p, sums);
        }
      }
    });
    for (int64_t i = 0; i < m.count; ++i) {
      const MixSourceGradient& g = m.gradients[i];
      if (g.coefficient == nullptr || g.reduction == MixReduction::time || g.elementwise(m.shape)) continue;
      write_row_sums<T>(g, row, sums_of<T>(g, block, accumulators));
    }
  }
}

template <class T>
void add_scaled(const MixScatter& s, const Position& p, double* sums) {
  float buffer[kTile], wide[kTile];
  const Weights gate = coefficients_of(s.grad, p, buffer);
  const T* grad = operand_at<T>(s.grad, p).now;
  const float* x;
  if constexpr (sizeof(T) == sizeof(float)) {
    x = grad;
  } else {
    widen(grad, p.n, wide);
    x = wide;
  }
  if (gate.weights) return add_products(gate.weights, x, p.n, sums);
  for (int64_t d = 0; d < p.n; ++d) sums[d] += static_cast<double>(gate.weight) * x[d];
}

template <class T, class E>
void scatter_row(const MixScatter& s, int64_t segment, int64_t h, E* out) {
  const int64_t begin = s.starts[segment], end = s.starts[segment + 1];
  for (int64_t d = 0; d < s.shape.dim; d += kTile) {
    const int64_t n = smaller(kTile, s.shape.dim - d);
    const auto position = [&](int64_t i) {
      const Place row = place_of(s.shape, s.order[i]);
      return Position{row, row, h, d, n};
    };
    if (end - begin == 1) {
      float buffer[kTile];
      const Position p = position(begin);
      const Weights gate = coefficients_of(s.grad, p, buffer);
      const Operand<T> none{nullptr, nullptr};
      add_sources(nullptr, gate, operand_at<T>(s.grad, p), Weights{}, none, n, out + d, false);
      continue;
    }
    double sums[kTile];
    float total[kTile];
    for (int64_t i = 0; i < n; ++i) sums[i] = 0.0;
    for (int64_t i = begin; i < end; ++i) add_scaled<T>(s, position(i), sums);
    for (int64_t i = 0; i < n; ++i) total[i] = static_cast<float>(sums[i]);
    for_vectors(n, [&](int64_t i, auto get, auto put) { put(out + d + i, get(total + i)); });
  }
}

template <class T, class E>
void scatter_segments(const MixScatter& s, int64_t begin, int64_t end, int64_t head_begin, int64_t head_end) {
  for (int64_t segment = begin; segment < end; ++segment) {
    E* out = static_cast<E*>(s.out) + s.targets[segment] * s.shape.heads * s.shape.dim;
    for (int64_t h = head_begin; h < head_end; ++h) scatter_row<T>(s, segment, h, out + h * s.shape.dim);
  }
}

template <class T>
void scatter_as(const MixScatter& s, int64_t begin, int64_t end, int64_t head_begin, int64_t head_end) {
  if (s.out_dtype == s.dtype) return scatter_segments<T, T>(s, begin, end, head_begin, head_end);
  scatter_segments<T, float>(s, begin, end, head_begin, head_end);
}

void forward(const MixForward& f, int64_t begin, int64_t end) {
  if (f.dtype == DType::float32) {
    forward_as<float>(f, begin, end);
  } else if (f.dtype == DType::bfloat16) {
    forward_as<bf16>(f, begin, end);
  } else {
    forward_as<f16>(f, begin, end);
  }
  if (f.stream) end_of_stream();
}

void backward(const MixBackward& m, int64_t begin, int64_t end, int64_t block, double* accumulators) {
  if (m.dtype == DType::float32) {
    backward_rows<float>(m, begin, end, block, accumulators);
  } else if (m.dtype == DType::bfloat16) {
    backward_rows<bf16>(m, begin, end, block, accumulators);
  } else {
    backward_rows<f16>(m, begin, end, block, accumulators);
  }
  if (m.stream) end_of_stream();
}

void scatter(const MixScatter& s, int64_t begin, int64_t end, int64_t head_begin, int64_t head_end) {
  if (s.dtype == DType::float32) return scatter_as<float>(s, begin, end, head_begin, head_end);
  if (s.dtype == DType::bfloat16) return scatter_as<bf16>(s, begin, end, head_begin, head_end);
  scatter_as<f16>(s, begin, end, head_begin, head_end);
}

}  // namespace

extern const MixKernels mix_kernels = {forward, backward, scatter};

}  // namespace resformer::RESFORMER_ISA

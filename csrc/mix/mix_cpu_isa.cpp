// The mixing kernels for one instruction set. They are bound by memory: each operand is read once, in order,
// and nothing of V's size exists besides the operands and the result.
#include "common/simd.h"
#include "mix/mix.h"

namespace resformer::RESFORMER_ISA {
namespace {

constexpr int64_t kChunk = 512;  // elements of a row whose coefficients are widened at a time

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
Vec load_some(const T* p, int64_t n) {
  T padded[kLanes] = {};
  memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

template <class T>
void store_some(T* p, Vec x, int64_t n) {
  T padded[kLanes];
  store(padded, x);
  memcpy(p, padded, n * sizeof(T));
}

// body(d, load, store): once a vector, and once for what is left over.
template <class Body>
RESFORMER_INLINE void for_vectors(int64_t n, const Body& body) {
  int64_t d = 0;
  for (; d + kLanes <= n; d += kLanes) {
    body(
        d, [](const auto* p) __attribute__((always_inline)) { return load(p); },
        [](auto* p, Vec x) __attribute__((always_inline)) { store(p, x); });
  }
  if (d < n) {
    const int64_t rest = n - d;
    body(
        d, [rest](const auto* p) { return load_some(p, rest); },
        [rest](auto* p, Vec x) { store_some(p, x, rest); });
  }
}

// A stretch of one source's row with its coefficients: `weights` where they differ along it, else `weight`.
struct Span {
  const float* weights;
  float weight;
};

template <class T>
void widen(const T* from, int64_t n, float* to) {
  for_vectors(n, [&](int64_t d, auto get, auto put) { put(to + d, get(from + d)); });
}

Span coefficients_of(const Coefficient& c, int64_t row, int64_t d, int64_t n, float* buffer) {
  if (c.data == nullptr) return {nullptr, c.value};
  const int64_t start = row + d * c.stride[3];
  if (c.stride[3] == 0) return {nullptr, c.load(start)};
  if (c.stride[3] != 1) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = c.load(start + i * c.stride[3]);
    return {buffer, 0.0f};
  }
  if (c.dtype == DType::float32) return {static_cast<const float*>(c.data) + start, 0.0f};
  if (c.dtype == DType::bfloat16) {
    widen(static_cast<const bf16*>(c.data) + start, n, buffer);
  } else {
    widen(static_cast<const f16*>(c.data) + start, n, buffer);
  }
  return {buffer, 0.0f};
}

struct Position {
  int64_t row, b, t, h, d, n;
};

template <class T>
const T* at(const MixSource& source, const Position& p) {
  return static_cast<const T*>(source.data) + source.offset(p.b, p.t, p.row, p.h) + p.d;
}

Span coefficients_of(const MixSource& source, const Position& p, float* buffer) {
  return coefficients_of(source.coefficient, source.coefficient.row(p.b, p.t, p.h), p.d, p.n, buffer);
}

// out = [sum +] a x [+ b y]. `sum` and `y` may be null; out is T for the last sources, else float.
template <class X, class Y, class Out>
void add_sources(const float* sum, Span a, const X* x, Span b, const Y* y, int64_t n, Out* out) {
  const Vec a_all = set1(a.weight), b_all = set1(b.weight);
  for_vectors(n, [&](int64_t d, auto get, auto put) __attribute__((always_inline)) {
    const Vec wa = a.weights ? get(a.weights + d) : a_all;
    Vec total = sum ? fma(wa, get(x + d), get(sum + d)) : mul(wa, get(x + d));
    if (y) total = fma(b.weights ? get(b.weights + d) : b_all, get(y + d), total);
    put(out + d, total);
  });
}

template <class T, class Last>
void mix_stretch(const MixForward& f, const Position& p, T* out) {
  float sum[kChunk], buffer_a[kChunk], buffer_b[kChunk];
  const MixSource* s = f.sources;
  const int64_t pairs_from = f.count % 2;
  if (pairs_from == 1) {
    const Span a = coefficients_of(s[0], p, buffer_a);
    if (f.count == 1) return add_sources<T, T>(nullptr, a, at<T>(s[0], p), Span{}, nullptr, p.n, out);
    add_sources<T, T>(nullptr, a, at<T>(s[0], p), Span{}, nullptr, p.n, sum);
  }
  for (int64_t i = pairs_from; i < f.count; i += 2) {
    const Span a = coefficients_of(s[i], p, buffer_a), b = coefficients_of(s[i + 1], p, buffer_b);
    const float* so_far = i == 0 ? nullptr : sum;
    if (i + 2 == f.count) {
      add_sources(so_far, a, at<T>(s[i], p), b, at<Last>(s[i + 1], p), p.n, out);
    } else {
      add_sources(so_far, a, at<T>(s[i], p), b, at<T>(s[i + 1], p), p.n, sum);
    }
  }
}

template <class Body>
void for_stretches(const MixShape& shape, int64_t row, int64_t h, const Body& body) {
  const int64_t b = row / shape.time, t = row % shape.time;
  for (int64_t d = 0; d < shape.dim; d += kChunk)
    body(Position{row, b, t, h, d, smaller(kChunk, shape.dim - d)});
}

template <class T, class Last>
void forward_rows(const MixForward& f, int64_t begin, int64_t end) {
  T* out = static_cast<T*>(f.out);
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t h = 0; h < f.shape.heads; ++h) {
      for_stretches(f.shape, row, h, [&](const Position& p) {
        mix_stretch<T, Last>(f, p, out + (row * f.shape.heads + h) * f.shape.dim + p.d);
      });
    }
  }
}

// Every source has the result's dtype but the last, which may be a float32 table.
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

// Products of float32 are exact in float64, and so is what a sum that cancels leaves of them.
double dot(const float* grad, const float* x, int64_t n) {
  VecDouble lanes[2] = {};
  double sum = 0.0;
  int64_t d = 0;
  for (; d + 2 * kDoubles <= n; d += 2 * kDoubles) {
    lanes[0] += load_double(grad + d) * load_double(x + d);
    lanes[1] += load_double(grad + d + kDoubles) * load_double(x + d + kDoubles);
  }
  for (; d < n; ++d) sum += static_cast<double>(grad[d]) * x[d];
  for (int64_t i = 0; i < kDoubles; ++i) sum += lanes[0][i] + lanes[1][i];
  return sum;
}

// Products of 16-bit numbers are exact in float32, and a row's sum of them is far finer than their dtype.
template <class T, class X>
double dot(const T* grad, const X* x, int64_t n) {
  Vec lanes = zero();
  for_vectors(n, [&](int64_t d, auto get, auto)
                     __attribute__((always_inline)) { lanes = fma(get(grad + d), get(x + d), lanes); });
  return reduce_add(lanes);
}

void add_products(const float* grad, const float* x, int64_t n, double* sums) {
  for (int64_t d = 0; d < n; ++d) sums[d] += static_cast<double>(grad[d]) * x[d];
}

template <class T, class X>
void add_products(const T* grad, const X* x, int64_t n, double* sums) {
  float products[kChunk];
  for_vectors(n, [&](int64_t d, auto get, auto put) { put(products + d, mul(get(grad + d), get(x + d))); });
  for (int64_t d = 0; d < n; ++d) sums[d] += products[d];
}

template <class T, class X, class C>
void write_products(const T* grad, const X* x, int64_t n, C* out) {
  for_vectors(n, [&](int64_t d, auto get, auto put) { put(out + d, mul(get(grad + d), get(x + d))); });
}

template <class T, class X>
void coefficient_gradient(const MixShape& shape, const MixSourceGradient& g, const Position& p, const T* grad,
                          const X* x, double* sums) {
  if (g.elementwise(shape)) {
    const int64_t at = (p.row * shape.heads + p.h) * shape.dim + p.d;
    if (g.coefficient_dtype == DType::float32) {
      write_products(grad, x, p.n, static_cast<float*>(g.coefficient) + at);
    } else {
      write_products(grad, x, p.n, static_cast<T*>(g.coefficient) + at);
    }
    return;
  }
  const int64_t h = g.keeps_head ? p.h : 0;
  if (g.keeps_dim) {
    add_products(grad, x, p.n, sums + h * shape.dim + p.d);
  } else {
    sums[h] += dot(grad, x, p.n);
  }
}

template <class T, class X>
void source_gradient(const MixBackward& m, int64_t i, const Position& p, double* sums) {
  const MixSourceGradient& g = m.gradients[i];
  const T* grad = at<T>(m.grad, p);
  if (g.value != nullptr) {
    float buffer[kChunk];
    const Span c = coefficients_of(m.sources[i], p, buffer);
    T* out = static_cast<T*>(g.value) + (p.row * m.shape.heads + p.h) * m.shape.dim + p.d;
    add_sources<T, T>(nullptr, c, grad, Span{}, nullptr, p.n, out);
  }
  if (g.coefficient != nullptr) coefficient_gradient(m.shape, g, p, grad, at<X>(m.sources[i], p), sums);
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
    for (int64_t h = 0; h < m.shape.heads; ++h) {
      for_stretches(m.shape, row, h, [&](const Position& p) {
        for (int64_t i = 0; i < m.count; ++i) {
          double* sums = sums_of<T>(m.gradients[i], block, accumulators);
          if (m.sources[i].dtype == m.dtype) {
            source_gradient<T, T>(m, i, p, sums);
          } else {
            source_gradient<T, float>(m, i, p, sums);
          }
        }
      });
    }
    for (int64_t i = 0; i < m.count; ++i) {
      const MixSourceGradient& g = m.gradients[i];
      if (g.coefficient == nullptr || g.reduction == MixReduction::time || g.elementwise(m.shape)) continue;
      write_row_sums<T>(g, row, sums_of<T>(g, block, accumulators));
    }
  }
}

template <class T>
void add_scaled(const MixScatter& s, const Position& p, double* sums) {
  float buffer[kChunk], wide[kChunk];
  const Span gate = coefficients_of(s.grad, p, buffer);
  const T* grad = at<T>(s.grad, p);
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
  for (int64_t d = 0; d < s.shape.dim; d += kChunk) {
    const int64_t n = smaller(kChunk, s.shape.dim - d);
    const auto position = [&](int64_t i) {
      const int64_t row = s.order[i];
      return Position{row, row / s.shape.time, row % s.shape.time, h, d, n};
    };
    if (end - begin == 1) {
      float buffer[kChunk];
      const Position p = position(begin);
      const Span gate = coefficients_of(s.grad, p, buffer);
      add_sources<T, T>(nullptr, gate, at<T>(s.grad, p), Span{}, nullptr, n, out + d);
      continue;
    }
    double sums[kChunk];
    float total[kChunk];
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
  if (f.dtype == DType::float32) return forward_as<float>(f, begin, end);
  if (f.dtype == DType::bfloat16) return forward_as<bf16>(f, begin, end);
  forward_as<f16>(f, begin, end);
}

void backward(const MixBackward& m, int64_t begin, int64_t end, int64_t block, double* accumulators) {
  if (m.dtype == DType::float32) return backward_rows<float>(m, begin, end, block, accumulators);
  if (m.dtype == DType::bfloat16) return backward_rows<bf16>(m, begin, end, block, accumulators);
  backward_rows<f16>(m, begin, end, block, accumulators);
}

void scatter(const MixScatter& s, int64_t begin, int64_t end, int64_t head_begin, int64_t head_end) {
  if (s.dtype == DType::float32) return scatter_as<float>(s, begin, end, head_begin, head_end);
  if (s.dtype == DType::bfloat16) return scatter_as<bf16>(s, begin, end, head_begin, head_end);
  scatter_as<f16>(s, begin, end, head_begin, head_end);
}

}  // namespace

extern const MixKernels mix_kernels = {forward, backward, scatter};

}  // namespace resformer::RESFORMER_ISA

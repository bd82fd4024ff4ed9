// Arithmetic of one GPU lane on its elements of a unit; shuffles and reductions are in mix_cuda.cu.
#pragma once

#include <cmath>

#include "common/vectors.h"
#include "mix/mix_units.h"

namespace resformer {

struct MixElement {
  int64_t row, b, t, h, d;

  static RESFORMER_INLINE MixElement at(const MixShape& shape, int64_t row, int64_t h, int64_t d) {
    const int64_t b = shape.batch == 1 ? 0 : row / shape.time;
    return {row, b, row - b * shape.time, h, d};
  }

  // Moves `step` rows on: to the next row, or to the same time of the next sequence.
  RESFORMER_INLINE void advance(const MixShape& shape, int64_t step) {
    row += step;
    t += step;
    if (t < shape.time) return;
    t -= shape.time;
    ++b;
  }
};

// Loads from a source that is not a table.
template <class T, int V>
static RESFORMER_INLINE void load_source(const MixSource& source, const MixElement& e, float* x) {
  const int64_t start = e.b * source.stride[0] + e.t * source.stride[1] + e.h * source.stride[2];
  load_vector<T, V>(static_cast<const T*>(source.data) + start + e.d, x);
}

// V coefficients from element e on; their dtype is T or float32.
template <class T, int V>
static RESFORMER_INLINE void load_coefficients(const Coefficient& c, bool wide, const MixElement& e,
                                               float* x) {
  const int64_t start = c.row(e.b, e.t, e.h) + e.d * c.stride[3];
  if (c.uniform_in_row()) {
    const float all = c.data == nullptr ? c.value : c.load(start);
    for (int i = 0; i < V; ++i) x[i] = all;
  } else if (!wide) {
    for (int i = 0; i < V; ++i) x[i] = c.load(start + i * c.stride[3]);
  } else if (c.dtype == DType::float32) {
    load_vector<float, V>(static_cast<const float*>(c.data) + start, x);
  } else {
    load_vector<T, V>(static_cast<const T*>(c.data) + start, x);
  }
}

// out = sum of c_i V_i, in the order of the sources, rounded once. Sources is an array of MixOperand.
template <class T, int V, class Sources>
static RESFORMER_INLINE void forward_lane(const MixShape& shape, const MixUnits& units,
                                          const Sources& sources, int64_t count, T* out, int64_t unit,
                                          int64_t lane) {
  const MixUnit u = units.at(unit, shape);
  const int64_t d = u.dim_begin + lane * V;
  if (d >= u.dim_end) return;
  MixElement e = MixElement::at(shape, u.group_begin, u.head_begin, d);
  for (; e.row < u.group_end; e.advance(shape, 1)) {
    float total[V] = {}, c[V], x[V];
    for (int64_t i = 0; i < count; ++i) {
      load_source<T, V>(sources[i].source, e, x);
      load_coefficients<T, V>(sources[i].source.coefficient, sources[i].wide_coefficient, e, c);
      for (int j = 0; j < V; ++j) total[j] = i == 0 ? c[j] * x[j] : fmaf(c[j], x[j], total[j]);
    }
    store_vector<T, V>(out + (e.row * shape.heads + e.h) * shape.dim + d, total);
  }
}

// Products of float32 are exact in float64, those of 16-bit numbers in float32; a vector of these is summed
// in float32.
template <class T, int V>
static RESFORMER_INLINE double vector_product(const float* a, const float* b) {
  if constexpr (sizeof(T) == sizeof(float)) {
    double sum = 0.0;
    for (int j = 0; j < V; ++j) sum += static_cast<double>(a[j]) * b[j];
    return sum;
  } else {
    float sum = 0.0f;
    for (int j = 0; j < V; ++j) sum = fmaf(a[j], b[j], sum);
    return sum;
  }
}

template <class T, int V>
static RESFORMER_INLINE void store_products(const MixPart& p, int64_t at, const float* grad, const float* x) {
  float products[V];
  for (int j = 0; j < V; ++j) products[j] = grad[j] * x[j];
  if (p.gradient.coefficient_dtype == DType::float32) {
    store_vector<float, V>(static_cast<float*>(p.gradient.coefficient) + at, products);
  } else {
    store_vector<T, V>(static_cast<T*>(p.gradient.coefficient) + at, products);
  }
}

// Writes a lane's elements of dV for one group of rows and, with BY_ELEMENT (dc differs by element), of dc.
// Otherwise returns the lane's share of the group's sum.
template <class T, int V, bool BY_ELEMENT>
static RESFORMER_INLINE double backward_lane(const MixPart& p, const MixUnit& u, int64_t group,
                                             int64_t lane) {
  const MixRows rows = p.units.rows(group, p.shape);
  const bool single = p.units.reduction == MixReduction::none && u.head_end - u.head_begin == 1;
  double sum = 0.0;
  for (int64_t d = u.dim_begin + lane * V; d < u.dim_end; d += p.units.lanes() * V) {
    double sums[V] = {};
    MixElement e = MixElement::at(p.shape, rows.begin, 0, d);
    for (int64_t i = 0; i < rows.count; ++i, e.advance(p.shape, rows.step)) {
      for (e.h = u.head_begin; e.h < u.head_end; ++e.h) {
        float grad[V], x[V];
        load_source<T, V>(p.grad, e, grad);
        if (p.gradient.value != nullptr) {
          load_coefficients<T, V>(p.source.coefficient, p.wide_coefficient, e, x);
          for (int j = 0; j < V; ++j) x[j] *= grad[j];
          T* const value = static_cast<T*>(p.gradient.value);
          store_vector<T, V>(value + (e.row * p.shape.heads + e.h) * p.shape.dim + d, x);
        }
        if (p.gradient.coefficient == nullptr) continue;
        load_source<T, V>(p.source, e, x);
        if constexpr (!BY_ELEMENT) {
          sum += vector_product<T, V>(grad, x);
        } else if (single) {
          store_products<T, V>(p, p.slot(group, e.h, d), grad, x);
        } else {
          for (int j = 0; j < V; ++j) sums[j] += static_cast<double>(grad[j]) * x[j];
        }
      }
    }
    if constexpr (BY_ELEMENT) {
      for (int j = 0; j < V && !single; ++j) p.store_sum(p.slot(group, u.head_begin, d + j), sums[j]);
    }
  }
  return sum;
}

// Sums every `lanes`-th part of an entry.
static RESFORMER_INLINE double sum_lane(const MixSum& s, int64_t entry, int64_t lane, int64_t lanes) {
  const double* first = s.partials + entry / s.width * s.parts * s.width + entry % s.width;
  double sum = 0.0;
  for (int64_t part = lane; part < s.parts; part += lanes) sum += first[part * s.width];
  return sum;
}

}  // namespace resformer

// Everything between the two products of a tile: softcap, bias, mask and the online softmax.
//
// Order of the contract: scale * qk, softcap, bias, mask, sink.
#pragma once

#include "attention/attention.h"
#include "common/gemm.h"

namespace resformer::RESFORMER_ISA {

constexpr float kLog2e = 1.44269504088896341f;
constexpr double kLn2 = 0.693147180559945309;
constexpr float kMinusInf = -__builtin_inff();

// The running maximum moves only when a score exceeds it by this much: softmax does not depend on the shift,
// float32 has room for its exponential, and most tiles then need neither a horizontal maximum nor a rescaled
// accumulator.
constexpr float kSlack = 8.0f;

// The unit that scores are kept in. For 16-bit inputs it is log2: the factor log2(e) is folded into the scale
// and exp is exp2. float32 keeps natural scores and pays a multiplication, because a rounded factor is an
// error of every score, and because a row with one key must find P = exp(s - LSE) = 1 again.
template <Precision precision>
struct Scores {
  static constexpr bool kNatural = precision == Precision::full;
  static constexpr float kUnit = kNatural ? 1.0f : kLog2e;

  static inline Vec exp(Vec x) {
    if constexpr (kNatural) x = mul(x, set1(kLog2e));
    return exp2<precision>(x);
  }
  static inline float exp(float x) {
    alignas(64) float lanes[kLanes];
    store(lanes, exp(set1(x)));
    return lanes[0];
  }
  // Natural log of a softmax's denominator, whose maximum is m and sum l. In float64: backward takes exp of
  // this, where a rounding error is one of every probability of the row.
  static inline float lse(float m, float l) {
    if constexpr (kNatural) return static_cast<float>(m + __builtin_log(static_cast<double>(l)));
    return static_cast<float>((m + __builtin_log2(static_cast<double>(l))) * kLn2);
  }
};

// Rows [first, first + count) of one (sequence, KV head): row r is query r / group of head h * group + r %
// group, so that the query heads of a KV head share its tiles.
struct RowTile {
  const Problem* problem;
  const Sequence* sequence;
  int64_t head_kv, first, count;

  int64_t query(int64_t row) const { return (first + row) / problem->group; }
  int64_t head(int64_t row) const { return head_kv * problem->group + (first + row) % problem->group; }
  int64_t lo(int64_t row) const { return problem->key_lo(*sequence, query(row)); }
  int64_t hi(int64_t row) const { return problem->key_hi(*sequence, query(row)); }
};

constexpr int64_t kMostRows = 144;

// The keys [lo, hi) that each row of a tile may see by position. Kept beside the tile: a division a row and
// tile of keys is a tenth of the work of a short window.
struct Bounds {
  int64_t lo[kMostRows], hi[kMostRows];

  void read(const RowTile& rows) {
    const Problem& p = *rows.problem;
    int64_t query = rows.query(0), head = rows.first % p.group;
    for (int64_t r = 0; r < rows.count; ++r) {
      lo[r] = p.key_lo(*rows.sequence, query);
      hi[r] = p.key_hi(*rows.sequence, query);
      if (++head == p.group) {
        head = 0;
        ++query;
      }
    }
  }
};

// The span of keys of every block of kTileRows rows inside the tile of keys [key, key + keys), relative to
// it. Positions only grow with the row, so a block spans from its first row's start to its last row's end.
static void block_spans(const Bounds& bounds, int64_t rows, int64_t key, int64_t keys, Span* spans) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    const int64_t last = smaller(r + kTileRows, rows) - 1;
    const int64_t lo = smaller(larger(bounds.lo[r] - key, 0), keys),
                  hi = smaller(bounds.hi[last] - key, keys);
    spans[r / kTileRows] = {static_cast<int32_t>(lo), static_cast<int32_t>(larger(hi, lo))};
  }
}

static inline int64_t lane_floor(int64_t column) { return column / kLanes * kLanes; }
static inline int64_t lane_ceil(int64_t column) { return round_up(column, kLanes); }

// One row of the bias, as float32 over columns [from, to) of the tile; what lies past `keys` is zero.
static void bias_row(const Bias& bias, int64_t batch, int64_t head, int64_t query, int64_t key, int64_t keys,
                     int64_t from, int64_t to, float* out) {
  const int64_t base =
      batch * bias.stride[0] + head * bias.stride[1] + query * bias.stride[2] + key * bias.stride[3];
  const int64_t step = bias.stride[3], end = smaller(to, keys);
  int64_t c = from;
  if (bias.kind == Bias::Kind::boolean) {
    const uint8_t* data = static_cast<const uint8_t*>(bias.data) + base;
    for (; c < end; ++c) out[c] = data[c * step] ? 0.0f : kMinusInf;
  } else if (bias.dtype == DType::float32) {
    const float* data = static_cast<const float*>(bias.data) + base;
    for (; c < end; ++c) out[c] = data[c * step];
  } else if (bias.dtype == DType::bfloat16) {
    const bf16* data = static_cast<const bf16*>(bias.data) + base;
    for (; c < end; ++c) out[c] = to_float(data[c * step]);
  } else {
    const f16* data = static_cast<const f16*>(bias.data) + base;
    for (; c < end; ++c) out[c] = to_float(data[c * step]);
  }
  for (; c < to; ++c) out[c] = 0.0f;
}

// Whether a boolean mask lets any row of the tile see any of its keys; other biases always may.
static bool tile_is_open(const RowTile& rows, int64_t key, int64_t keys, const Span* spans) {
  const Bias& bias = rows.problem->bias;
  if (bias.kind != Bias::Kind::boolean) return true;
  const bool one_head = bias.stride[1] == 0, one_query = bias.stride[2] == 0;
  for (int64_t r = 0; r < rows.count; ++r) {
    if (r > 0 && one_query && (one_head || r >= rows.problem->group)) break;
    if (one_head && r > 0 && rows.query(r) == rows.query(r - 1)) continue;
    const Span span = one_query ? Span{0, static_cast<int32_t>(keys)} : spans[r / kTileRows];
    const uint8_t* data = static_cast<const uint8_t*>(bias.data) + rows.sequence->batch * bias.stride[0] +
                          rows.head(r) * bias.stride[1] + rows.query(r) * bias.stride[2] +
                          key * bias.stride[3];
    for (int64_t c = span.lo; c < span.hi; ++c) {
      if (data[c * bias.stride[3]]) return true;
    }
  }
  return false;
}

// scale * qk -> softcap -> bias, in place over columns [from, to); the result is times log2(e). Where `slope`
// is given it receives the softcap's derivative, which backward needs.
template <Precision precision>
static void transform_row(const RowTile& rows, int64_t row, int64_t key, int64_t keys, int64_t from,
                          int64_t to, float* bias_scratch, float* s, float* slope) {
  const Problem& p = *rows.problem;
  const bool biased = p.bias.kind != Bias::Kind::none, boolean = p.bias.kind == Bias::Kind::boolean;
  if (biased) {
    bias_row(p.bias, rows.sequence->batch, rows.head(row), rows.query(row), key, keys, from, to,
             bias_scratch);
  }
  for (int64_t c = from; c < to; c += kLanes) {
    Vec x = load(s + c);
    if (p.softcap > 0.0f) {
      Vec derivative;
      x = mul(tanh(mul(x, set1(1.0f / p.softcap)), slope ? &derivative : nullptr), set1(p.softcap));
      if (slope) store(slope + c, derivative);
    }
    if (biased) x = add(x, load(bias_scratch + c));
    store(s + c, mul(x, set1(Scores<precision>::kUnit)));
  }
  if (boolean) {  // not by the sum alone: NaN at a masked key must not survive
    for (int64_t c = from; c < to; ++c) s[c] = bias_scratch[c] == kMinusInf ? kMinusInf : s[c];
  }
}

static inline bool needs_transform(const Problem& p) {
  return p.softcap > 0.0f || p.bias.kind != Bias::Kind::none;
}
// What the score product is multiplied by: the scale, and the unit at once where nothing comes between.
template <Precision precision>
static inline float score_alpha(const Problem& p) {
  return needs_transform(p) ? p.scale : p.scale * Scores<precision>::kUnit;
}

// -inf in the columns of [from, to) outside each row's [lo, hi), for rows whose bounds ascend. By whole
// vectors: they are loaded again at once, and a vector load from under a narrower store waits for memory.
template <int rows>
static inline void mask_rows(float* s, int64_t stride, int64_t from, int64_t to, const int64_t* lo,
                             const int64_t* hi, int64_t key) {
  if (lo[rows - 1] - key <= from && hi[0] - key >= to) return;
  int32_t begin[rows], end[rows];
  for (int i = 0; i < rows; ++i) {
    begin[i] = static_cast<int32_t>(smaller(larger(lo[i] - key, from), to));
    end[i] = static_cast<int32_t>(smaller(larger(hi[i] - key, from), to));
  }
  const auto mask = [&](int32_t c) {
    for (int i = 0; i < rows; ++i) {
      float* at = s + i * stride + c;
      store(at, keep_lanes(load(at), begin[i] - c, end[i] - c, set1(kMinusInf)));
    }
  };
  int32_t c = static_cast<int32_t>(from);
  for (; c < begin[rows - 1]; c += kLanes) mask(c);
  const int32_t last = static_cast<int32_t>(lane_floor(end[0]));
  for (c = c > last ? c : last; c < to; c += kLanes) mask(c);
}

// Running softmax state of one row: maximum (in the unit of scores) and lane-wise partial sums.
struct RowState {
  float m;
  alignas(64) float l[kLanes];
};

// How many rows the softmax takes abreast: their maxima, sums and bases stay in registers, and a short span
// costs its loop's mispredicted end once for all of them.
constexpr int kRowsAbreast = kTileVecs == 4 ? 6 : kTileRows == 6 ? 3 : 2;
static_assert(kTileRows % kRowsAbreast == 0);

// Turns the scores s[from, to) of some rows into probabilities (in place, as words of Dot), with columns
// outside each row's keys [lo, hi) masked.
template <class Dot, Precision precision, int rows>
static inline void softmax_rows(float* s, int64_t stride, int64_t from, int64_t to, const int64_t* lo,
                                const int64_t* hi, int64_t key, RowState* state, float* acc,
                                int64_t columns) {
  mask_rows<rows>(s, stride, from, to, lo, hi, key);
  Vec top[rows], sum[rows], base[rows];
#pragma GCC unroll 6
  for (int i = 0; i < rows; ++i) top[i] = load(s + i * stride + from);
  for (int64_t c = from + kLanes; c < to; c += kLanes) {
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) top[i] = max(top[i], load(s + i * stride + c));
  }
  for (int i = 0; i < rows; ++i) {
    RowState& row = state[i];
    if (any_greater(top[i], set1(row.m + kSlack))) {
      const float m = reduce_max(top[i]);
      if (row.m != kMinusInf) {
        const Vec shrink = set1(Scores<precision>::exp(row.m - m));
        store(row.l, mul(load(row.l), shrink));
        float* out = acc + i * columns;
        for (int64_t d = 0; d < columns; d += kLanes) store(out + d, mul(load(out + d), shrink));
      }
      row.m = m;
    }
    base[i] = set1(row.m == kMinusInf ? 0.0f : row.m);
    sum[i] = load(row.l);
  }
  for (int64_t c = from; c < to; c += kLanes) {
#pragma GCC unroll 6
    for (int i = 0; i < rows; ++i) {
      float* at = s + i * stride;
      const Vec p = Scores<precision>::exp(sub(load(at + c), base[i]));
      sum[i] = add(sum[i], p);
      if constexpr (Dot::kPack == 2) {
        store(reinterpret_cast<bf16*>(at) + c, p);
      } else {
        store(at + c, p);
      }
    }
  }
  for (int i = 0; i < rows; ++i) store(state[i].l, sum[i]);
}

}  // namespace resformer::RESFORMER_ISA

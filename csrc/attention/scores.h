// Between the two products of a tile: softcap, bias and masks.
//
// Order of the contract: scale * qk, softcap, bias, mask, sink.
#pragma once

#include "attention/attention.h"
#include "common/gemm.h"
#include "common/softmax.h"

namespace resformer::RESFORMER_ISA {

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
  if (boolean) {  // adding -inf is not enough: NaN at a masked key must not survive
    for (int64_t c = from; c < to; ++c) s[c] = bias_scratch[c] == kMinusInf ? kMinusInf : s[c];
  }
}

static inline bool needs_transform(const Problem& p) {
  return p.softcap > 0.0f || p.bias.kind != Bias::Kind::none;
}
// Factor of the score product: the scale, times log2(e) where neither softcap nor bias follows.
template <Precision precision>
static inline float score_alpha(const Problem& p) {
  return needs_transform(p) ? p.scale : p.scale * Scores<precision>::kUnit;
}

}  // namespace resformer::RESFORMER_ISA

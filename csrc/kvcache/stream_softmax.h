// The softmax of a streamed block (stream.h), on its scores as they come out: by token, with a lane for each
// row of each head. Maxima, exponentials and sums then need neither a transposition nor a sum over lanes. The
// less time this takes the better: nothing is prefetched meanwhile.
//
// Sums over keys are kept for each position modulo kLanes and added by halves at the end, as reduce_add adds
// the lanes of softmax_rows, so that both give the same bits.
#pragma once

#include "common/softmax.h"
#include "kvcache/tile.h"

namespace resformer::RESFORMER_ISA {

// State of a unit's rows, a lane each: their maxima, what is subtracted from their scores, and kLanes partial
// sums for each. `width` is whole vectors: lanes past the last row have no maximum to raise.
class StreamState {
 public:
  static int64_t floats(int64_t width) { return width * (2 + kLanes); }

  StreamState(float* memory, int64_t width)
      : max_(memory), base_(memory + width), sums_(memory + 2 * width), width_(width) {}

  void reset(int64_t rows) const {
    for (int64_t i = 0; i < width_; ++i) max_[i] = i < rows ? kMinusInf : -kMinusInf;
    memset(base_, 0, width_ * (1 + kLanes) * sizeof(float));
  }
  float* max(int64_t lane) const { return max_ + lane; }
  // The maximum, or 0 where a row has seen no score.
  float* base(int64_t lane) const { return base_ + lane; }
  // Partial sums of the keys at `token` modulo kLanes.
  float* sum(int64_t token, int64_t lane) const { return sums_ + token % kLanes * width_ + lane; }

  // Adds the partial sums of each row; from then on sum(0, lane) is the whole.
  void close() const {
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half * width_; i += kLanes)
        store(sums_ + i, add(load(sums_ + i), load(sums_ + half * width_ + i)));
    }
  }

 private:
  float *max_, *base_, *sums_;
  int64_t width_;
};

// -inf in the scores of tokens of [from, to) outside [lo, hi) of a row, of R rows a head.
template <int R>
static inline void mask_stream(float* s, int64_t width, int64_t heads, int64_t from, int64_t to,
                               const int64_t* lo, const int64_t* hi) {
  if (lo[R - 1] <= from && hi[0] >= to) return;
  for (int64_t t = from; t < to; ++t) {
    for (int r = 0; r < R; ++r) {
      if (t >= lo[r] && t < hi[r]) continue;
      for (int64_t h = 0; h < heads; ++h) s[t * width + h * R + r] = kMinusInf;
    }
  }
}

// Moves the maxima of the lanes in which `top` exceeds them by the slack (softmax.h), and scales what was
// summed.
template <Precision precision>
static void raise_maxima(Vec top, int64_t lane, const StreamState& state, float* acc, int64_t columns) {
  float tops[kLanes];
  store(tops, top);
  for (int64_t i = lane; i < lane + kLanes; ++i) {
    float* m = state.max(i);
    if (!(tops[i - lane] > *m + kSlack)) continue;
    if (*m != kMinusInf) {
      const float shrink = Scores<precision>::exp(*m - tops[i - lane]);
      for (int64_t t = 0; t < kLanes; ++t) *state.sum(t, i) *= shrink;
      float* out = acc + i * columns;
      for (int64_t d = 0; d < columns; d += kLanes) store(out + d, mul(load(out + d), set1(shrink)));
    }
    *m = *state.base(i) = tops[i - lane];
  }
}

// Turns the scores of `rows` rows, tokens [from, to) of a block, into words of P, in place: word w of all
// rows at s + w * width.
template <class M, Precision precision>
static void softmax_stream(float* s, int64_t width, int64_t rows, int64_t from, int64_t to,
                           const StreamState& state, float* acc, int64_t columns) {
  using Unit = Scores<precision>;
  constexpr int kPack = M::Dot::kPack;
  for (int64_t lane = 0; lane < rows; lane += kLanes) {
    Vec top = load(s + from * width + lane);
    for (int64_t t = from + 1; t < to; ++t) top = max(top, load(s + t * width + lane));
    if (any_greater(top, add(load(state.max(lane)), set1(kSlack))))
      raise_maxima<precision>(top, lane, state, acc, columns);
    const Vec base = load(state.base(lane));
    const auto exp = [&](int64_t t) {
      const Vec p = Unit::exp(sub(load(s + t * width + lane), base));
      float* sum = state.sum(t, lane);
      store(sum, add(load(sum), p));
      return p;
    };
    int64_t t = from;
    for (; t + kPack <= to; t += kPack) {
      const Vec first = exp(t);
      store(s + t / kPack * width + lane, M::word(first, kPack == 2 ? exp(t + 1) : zero()));
    }
    if (t < to) store(s + t / kPack * width + lane, M::word(exp(t), zero()));
  }
}

}  // namespace resformer::RESFORMER_ISA

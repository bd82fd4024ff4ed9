// Writes new tokens into the cache: copied as they are, or quantised to int8 with a scale per token and head.
#pragma once

#include <algorithm>

#include "common/parallel.h"
#include "common/rows.h"
#include "kvcache/kvcache.h"

namespace resformer::RESFORMER_ISA {

// scale = max|x| / 127, code = x * (127 / max|x|) to the nearest even integer. A row with a NaN or an
// infinity gets that as its scale, and codes of zero where the product is NaN: it reads back as NaN.
template <class T>
static void quantise_row(const T* src, int64_t dim, int8_t* codes, float* scale) {
  float most = 0.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float x = __builtin_fabsf(to_float(src[d]));
    most = x > most || x != x ? x : most;
    if (x != x) break;
  }
  const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
  *scale = most / 127.0f;
  for (int64_t d = 0; d < dim; ++d) {
    const float code = __builtin_rintf(to_float(src[d]) * inverse);
    codes[d] = code == code ? static_cast<int8_t>(code) : int8_t{0};
  }
}

template <class T>
class Append {
 public:
  explicit Append(const CacheProblem& p) : p_(p) {}

  void run() const {
    constexpr int64_t kSerialBytes = 1 << 16;
    // Tokens of the sequences before each one.
    std::vector<int64_t> before{0};
    for (const CacheSequence& s : p_.sequences) before.push_back(before.back() + s.added.count);
    const int64_t tokens = before.back();
    const int64_t bytes =
        p_.heads_kv * static_cast<int64_t>(sizeof(T)) *
        ((p_.keys.added.data ? p_.keys.dim : 0) + (p_.values.added.data ? p_.values.dim : 0));
    if (bytes == 0 || tokens == 0) return;
    const int64_t chunk = larger(kSerialBytes / bytes, 1), chunks = (tokens + chunk - 1) / chunk;
    const auto write_chunk = [&](int64_t unit, int) {
      const int64_t end = smaller((unit + 1) * chunk, tokens);
      int64_t i = unit * chunk;
      int64_t b = std::upper_bound(before.begin(), before.end(), i) - before.begin() - 1;
      for (; i < end; ++i) {
        while (i >= before[b + 1]) ++b;
        token(b, i - before[b]);
      }
    };
    // A decoded token is one chunk: waking threads would cost more.
    if (chunks == 1) return write_chunk(0, 0);
    parallel_units(chunks, [] { return 0; }, write_chunk);
  }

 private:
  void token(int64_t b, int64_t i) const {
    const CacheSequence& s = p_.sequences[b];
    const int64_t to = s.length - s.added.count + i;
    write(p_.keys, b, s.added.first + i, p_.keys.table.place(b, to));
    write(p_.values, b, s.added.first + i, p_.values.table.place(b, to));
  }

  void write(const CacheSide& side, int64_t b, int64_t i, const CacheRow& to) const {
    if (!side.added.data) return;
    for (int64_t h = 0; h < p_.heads_kv; ++h) {
      const T* src = side.added.row<const T>(b, i, h);
      if (p_.quantised) {
        const int64_t* s = side.scale_stride;
        quantise_row(src, side.dim, side.cache.row<int8_t>(to.row, to.at, h),
                     side.scale + to.row * s[0] + to.at * s[1] + h * s[2]);
      } else {
        memcpy(side.cache.row<T>(to.row, to.at, h), src, side.dim * sizeof(T));
      }
    }
  }

  const CacheProblem& p_;
};

}  // namespace resformer::RESFORMER_ISA

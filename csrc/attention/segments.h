// Long sequences under a short window, split into shorter ones.
#pragma once

#include <algorithm>
#include <vector>

#include "attention/attention.h"

namespace resformer {

// Segments of queries, each with the keys that its windows reach: forward then packs and attends a segment
// while it is in the second-level cache, where a whole sequence's packed keys would pass through memory. The
// keys that two segments share are packed twice, so a segment is several windows long.
inline std::vector<Sequence> cut_to_windows(const Problem& p) {
  constexpr int64_t kShortest = 2048, kWindows = 4;
  if (p.window_left < 0 || p.window_right < 0 || p.bias.kind != Bias::Kind::none) return p.sequences;
  const int64_t window = p.window_left + p.window_right + 1;
  const int64_t length = std::max(kShortest / p.group, kWindows * window);
  std::vector<Sequence> cut;
  for (const Sequence& s : p.sequences) {
    const int64_t segments = std::max<int64_t>(s.tq / length, 1);
    for (int64_t i = 0; i < segments; ++i) {
      const int64_t first = s.tq * i / segments, last = s.tq * (i + 1) / segments;
      Sequence part = s;
      if (segments > 1) {
        const int64_t lo = p.key_lo(s, first), hi = std::max(p.key_hi(s, last - 1), lo);
        part = {s.batch, s.q_start + first, s.k_start + lo, last - first, hi - lo, first + s.diagonal - lo,
                0};
      }
      cut.push_back(part);
    }
  }
  return cut;
}

}  // namespace resformer

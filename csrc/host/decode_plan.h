// How a decode step is cut up: which sequences go together, and in how many parts each one's keys are read.
#pragma once

#include <cstdint>
#include <vector>

namespace resformer {

struct DecodeGroup {
  std::vector<int64_t> sequences;  // their places in the batch, in order
  int64_t num_splits = 1;
};

struct DecodePlan {
  std::vector<DecodeGroup> groups;
  int64_t keys_per_split = 0;
  double efficiency = 1.0;  // keys to read / (workers * keys' worth of time that the busiest worker takes)
};

// lengths: keys of each sequence. heads: KV heads, each read by a worker of its own. workers: threads, or
// SMs. tile: the keys that a kernel reads at once. overhead: what one more part costs, in keys. max_groups:
// launches that may be spent.
DecodePlan plan_decode(const std::vector<int64_t>& lengths, int64_t heads, int64_t workers, int64_t tile,
                       int64_t overhead, int64_t max_groups);

}  // namespace resformer

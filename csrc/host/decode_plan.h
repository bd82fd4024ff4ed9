// Split-KV plan of a decode step: groups of sequences, and the splits of each group's keys.
#pragma once

#include <cstdint>
#include <vector>

namespace resformer {

struct DecodeGroup {
  std::vector<int64_t> sequences;  // indices in the batch, ascending
  int64_t num_splits = 1;
};

struct DecodePlan {
  std::vector<DecodeGroup> groups;
  int64_t keys_per_split = 0;
  double efficiency = 1.0;  // keys / (workers * time of the busiest worker, in keys)
};

// lengths: keys of each sequence. heads: KV heads, each read by a worker of its own. workers: threads, or
// SMs. tile: keys of a kernel's tile. overhead: cost of one more split, in keys. max_groups: most launches.
DecodePlan plan_decode(const std::vector<int64_t>& lengths, int64_t heads, int64_t workers, int64_t tile,
                       int64_t overhead, int64_t max_groups);

}  // namespace resformer

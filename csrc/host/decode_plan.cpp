#include "host/decode_plan.h"

#include <algorithm>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

namespace resformer {

namespace {

constexpr int64_t kMaxSplits = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t splits_of(int64_t length, int64_t part) {
  return std::clamp<int64_t>(ceil_div(length, part), 1, kMaxSplits);
}

// Time of the busiest worker, in keys: exact where all splits are alike, else the upper bound of assigning
// them in descending order.
double cost(const std::vector<int64_t>& lengths, int64_t heads, int64_t workers, int64_t overhead,
            int64_t part) {
  std::map<int64_t, int64_t, std::greater<>> counts;  // splits by their keys
  for (int64_t length : lengths) {
    const int64_t splits = splits_of(length, part);
    counts[ceil_div(length, splits)] += heads * splits;
  }
  const auto largest = static_cast<double>(counts.begin()->first + overhead);
  if (counts.size() == 1) return largest * static_cast<double>(ceil_div(counts.begin()->second, workers));
  double total = 0;
  for (const auto& [keys, count] : counts) total += static_cast<double>(count * (keys + overhead));
  const auto share = static_cast<double>(workers);
  return total / share + largest * (1 - 1 / share);
}

void check(const std::vector<int64_t>& lengths, int64_t heads, int64_t workers, int64_t tile,
           int64_t overhead, int64_t max_groups) {
  const auto at_least = [](const char* name, int64_t value, int64_t least) {
    if (value >= least) return;
    throw std::invalid_argument(std::string(name) + " must be at least " + std::to_string(least) + ", got " +
                                std::to_string(value));
  };
  for (int64_t length : lengths) at_least("lengths", length, 0);
  at_least("heads", heads, 1);
  at_least("workers", workers, 1);
  at_least("tile", tile, 1);
  at_least("overhead", overhead, 0);
  at_least("max_groups", max_groups, 1);
}

// Merges groups adjacent in number of splits, the pair that adds the fewest splits first, down to max_groups.
std::vector<DecodeGroup> grouped(const std::vector<int64_t>& lengths, int64_t part, int64_t max_groups) {
  std::map<int64_t, std::vector<int64_t>> by_splits;
  for (size_t i = 0; i < lengths.size(); ++i) {
    by_splits[splits_of(lengths[i], part)].push_back(static_cast<int64_t>(i));
  }
  std::vector<DecodeGroup> groups;
  for (auto& [splits, sequences] : by_splits) groups.push_back({std::move(sequences), splits});
  while (static_cast<int64_t>(groups.size()) > max_groups) {
    size_t best = 0;
    int64_t least = INT64_MAX;
    for (size_t i = 0; i + 1 < groups.size(); ++i) {
      const int64_t wasted = static_cast<int64_t>(groups[i].sequences.size()) *
                             (groups[i + 1].num_splits - groups[i].num_splits);
      if (wasted < least) best = i, least = wasted;
    }
    DecodeGroup& kept = groups[best + 1];
    kept.sequences.insert(kept.sequences.end(), groups[best].sequences.begin(), groups[best].sequences.end());
    std::sort(kept.sequences.begin(), kept.sequences.end());
    groups.erase(groups.begin() + static_cast<int64_t>(best));
  }
  // The longest first, so that they start first.
  std::reverse(groups.begin(), groups.end());
  return groups;
}

}  // namespace

DecodePlan plan_decode(const std::vector<int64_t>& lengths, int64_t heads, int64_t workers, int64_t tile,
                       int64_t overhead, int64_t max_groups) {
  check(lengths, heads, workers, tile, overhead, max_groups);
  DecodePlan plan;
  if (lengths.empty()) return plan;
  const int64_t longest = std::max<int64_t>(1, *std::max_element(lengths.begin(), lengths.end()));
  double total = 0;
  for (int64_t length : lengths) total += static_cast<double>(heads * length);
  double best = 0;
  for (int64_t splits = 1; splits <= kMaxSplits; splits += 1 + splits / 8) {
    const int64_t part = ceil_div(ceil_div(longest, splits), tile) * tile;
    if (part == plan.keys_per_split) continue;
    const double found = cost(lengths, heads, workers, overhead, part);
    // The cost of merging splits is not counted, so more of them must gain a twentieth.
    if (plan.keys_per_split == 0 || found < 0.95 * best) {
      best = found;
      plan.keys_per_split = part;
    }
    if (part == tile) break;
  }
  plan.groups = grouped(lengths, plan.keys_per_split, max_groups);
  plan.efficiency = best > 0 ? total / (static_cast<double>(workers) * best) : 1.0;
  return plan;
}

}  // namespace resformer

#include "scheduler.h"

#include <algorithm>

namespace gpu {
namespace {

constexpr uint32_t AS_FAR_AS_IT_GETS = 1 << 20;
constexpr int DRAWS = 16;  // before all warps are looked through

}  // namespace

void Scheduler::add(Block& block) {
  for (Warp& warp : block.warps) warps_.push_back(&warp);
}

void Scheduler::remove(Block& block) {
  const Warp* last = warps_.empty() ? nullptr : warps_[at_];
  std::erase_if(warps_, [&](const Warp* warp) { return warp->block == &block; });
  const auto found = std::find(warps_.begin(), warps_.end(), last);
  at_ = found == warps_.end() ? 0 : found - warps_.begin();
}

bool Scheduler::ready(const Warp& warp) const {
  if (warp.live == 0 || (warp.polls >= MOST_POLLS && machine_.events == warp.looked_at)) return false;
  return std::any_of(warp.groups.begin(), warp.groups.end(), [](const Group& group) { return !group.stuck; });
}

// A ready warp, of the block that ran last if there is one and it is wanted; the first found from a place
// that is drawn.
Warp* Scheduler::drawn(bool within_block) {
  const size_t count = warps_.size();
  const Block* block = within_block ? warps_[at_]->block : nullptr;
  const auto wanted = [&](const Warp& warp) {
    return (block == nullptr || warp.block == block) && ready(warp);
  };
  for (int draw = 0; draw < DRAWS && block == nullptr; ++draw) {
    const size_t i = machine_.random() % count;
    if (wanted(*warps_[i])) return warps_[at_ = i];
  }
  const size_t first = machine_.random() % count;
  for (size_t i = 0; i < count; ++i) {
    const size_t j = (first + i) % count;
    if (wanted(*warps_[j])) return warps_[at_ = j];
  }
  return nullptr;
}

Warp* Scheduler::next(uint32_t* steps) {
  *steps = 1;
  const size_t count = warps_.size();
  if (count == 0) return nullptr;
  switch (machine_.launch.policy) {
    case Policy::round_robin:
      for (size_t i = 1; i <= count; ++i) {
        const size_t j = (at_ + i) % count;
        if (ready(*warps_[j])) return warps_[at_ = j];
      }
      return nullptr;
    case Policy::random: {
      // Mostly short runs, some long: one warp gets well ahead of another now and then.
      const uint64_t luck = machine_.random();
      *steps = 1u << (luck % 4 == 0 ? luck / 4 % 10 : luck / 4 % 4);
      return drawn(false);
    }
    case Policy::warp_first:
      *steps = AS_FAR_AS_IT_GETS;
      if (ready(*warps_[at_])) return warps_[at_];
      return drawn(false);
    case Policy::block_first: {
      *steps = 1u << (machine_.random() % 10);
      Warp* found = drawn(true);
      return found != nullptr ? found : drawn(false);
    }
  }
  return nullptr;
}

}  // namespace gpu

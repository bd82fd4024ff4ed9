#include "flags.h"

#include <algorithm>

#include "machine.h"

namespace gpu {

void Flags::release(Released& to, const View& view, Scope scope, uint32_t block) {
  const bool known = to.number == block || to.block.empty();
  if (known || within_block(scope)) {
    if (!known) to.block.clear();
    to.number = block;
    to.block.join(view);
  }
  if (!within_block(scope)) to.all.join(view);
}

void Flags::store(Warp& warp, uint64_t location, Order order, Scope scope, uint32_t lane, bool continues) {
  const auto fenced = fenced_.find(warp.number);
  const bool silent = !releases(order) && (fenced == fenced_.end() || fenced->second.fences.empty());
  if (!continues) released_.erase(location);
  if (silent) return;
  const Mask lanes = Mask(1) << lane;
  const uint32_t block = warp.block->number;
  if (releases(order)) return release(released_[location], publish(warp, lanes), scope, block);
  for (const Fence& fence : fenced->second.fences)
    if ((fence.lanes & lanes) != 0)
      release(released_[location], *fence.view, std::min(scope, fence.scope), block);
}

void Flags::load(Warp& warp, uint64_t location, Order order, Scope scope, uint32_t lane) {
  const auto found = released_.find(location);
  if (found == released_.end()) return;
  const Released& released = found->second;
  const Mask lanes = Mask(1) << lane;
  Observed seen{lanes, {}, {}};
  if (released.number == warp.block->number) seen.block = released.block;
  if (!within_block(scope)) seen.all = released.all;
  if (acquires(order)) {
    seen.all.join(seen.block);
    return acquire(warp, seen.all, lanes);
  }
  std::vector<Observed>& observed = fenced_[warp.number].observed;
  const auto same = std::find_if(observed.begin(), observed.end(),
                                 [&](const Observed& other) { return other.lanes == lanes; });
  if (same == observed.end()) {
    observed.push_back(std::move(seen));
  } else {
    same->all.join(seen.all);
    same->block.join(seen.block);
  }
}

void Flags::fence(Warp& warp, Scope scope, Mask lanes) {
  Fenced& fenced = fenced_[warp.number];
  std::vector<Observed> later;
  for (Observed& seen : fenced.observed) {
    if ((seen.lanes & lanes) == 0) {
      later.push_back(std::move(seen));
      continue;
    }
    acquire(warp, seen.block, seen.lanes & lanes);
    if (!within_block(scope)) acquire(warp, seen.all, seen.lanes & lanes);
  }
  fenced.observed = std::move(later);
  std::erase_if(fenced.fences, [&](const Fence& fence) { return (fence.lanes & ~lanes) == 0; });
  fenced.fences.push_back({lanes, scope, std::make_shared<const View>(publish(warp, lanes))});
}

void Flags::forget(uint64_t first, uint64_t end) {
  std::erase_if(released_, [&](const auto& each) { return each.first >= first && each.first < end; });
}

}  // namespace gpu

#include "causality.h"

#include "machine.h"

namespace gpu {
namespace {

constexpr Seen NOTHING;

// Accesses of these lanes of a warp before a clock; of the whole warp where they are all that it has.
Seen seen_of(const Warp& warp, Mask lanes, Clock before) {
  return lanes == warp.exists ? Seen{before, 0, 0} : Seen{0, lanes, before};
}

// A warp's own copies by cp.async that it has waited for: they are ordered as its own accesses are.
void see_copies(View& view, const Warp& warp, const Causality& causality, Mask lanes) {
  const uint32_t finished = warp.queues[static_cast<int>(QueueOf::cp_async)].finished;
  if (finished != 0)
    view.see(causality.strand(warp.number, StrandOf::cp_async), seen_of(warp, lanes, finished + 1));
}

}  // namespace

const View::Entry* View::find(Strand strand) const {
  const auto found =
      std::lower_bound(entries_.begin(), entries_.end(), strand,
                       [](const Entry& entry, Strand wanted) { return entry.strand < wanted; });
  return found != entries_.end() && found->strand == strand ? &*found : nullptr;
}

const Seen& View::generic(Strand strand) const {
  const Entry* found = find(strand);
  return found != nullptr ? found->generic : NOTHING;
}

View::Entry& View::at(Strand strand) {
  if (const Entry* found = find(strand)) return entries_[found - entries_.data()];
  const auto place =
      std::lower_bound(entries_.begin(), entries_.end(), strand,
                       [](const Entry& entry, Strand wanted) { return entry.strand < wanted; });
  return *entries_.insert(place, {strand, {}, {}});
}

bool View::covers_for_async(Strand strand, Clock clock, uint32_t lane) const {
  const Entry* found = find(strand);
  return found != nullptr && found->generic.covers(clock, lane) && found->async.covers(clock, lane);
}

bool View::covers_all(Strand strand, Clock clock, bool for_async) const {
  const Entry* found = find(strand);
  return found != nullptr && clock < found->generic.clock && (!for_async || clock < found->async.clock);
}

void View::see_for_async(Strand strand, Seen seen) {
  Entry& entry = at(strand);
  entry.generic.join(seen);
  entry.async.join(seen);
}

void View::fence_async(Strand own, Seen fenced) {
  for (Entry& entry : entries_) entry.async.join(entry.generic);
  for (Aside& aside : asides_) aside.view.fence_async(own, {});
  at(own).async.join(fenced);
}

void View::clear() {
  entries_.clear();
  asides_.clear();
}

void View::join(const View& other) {
  const size_t before = entries_.size();
  size_t mine = 0;
  for (const Entry& entry : other.entries_) {
    while (mine < before && entries_[mine].strand < entry.strand) ++mine;
    if (mine < before && entries_[mine].strand == entry.strand) {
      entries_[mine].generic.join(entry.generic);
      entries_[mine].async.join(entry.async);
    } else {
      entries_.push_back(entry);
    }
  }
  if (entries_.size() != before)
    std::inplace_merge(entries_.begin(), entries_.begin() + before, entries_.end(),
                       [](const Entry& a, const Entry& b) { return a.strand < b.strand; });
  for (const Aside& aside : other.asides_) set_aside(aside.lanes, aside.view);
}

void View::set_aside(Mask lanes, const View& view) {
  for (Aside& aside : asides_)
    if (aside.lanes == lanes) return aside.view.join(view);
  asides_.push_back({lanes, view});
}

View View::of_lanes(Mask lanes) const {
  if (asides_.empty()) return *this;
  View view;
  view.entries_ = entries_;
  for (const Aside& aside : asides_)
    if ((aside.lanes & lanes) != 0) view.join(aside.view);
  return view;
}

void View::share(Mask lanes, bool all) {
  if (all) {
    const std::vector<Aside> known = std::move(asides_);
    asides_.clear();
    for (const Aside& aside : known) join(aside.view);
  } else {
    for (Aside& aside : asides_)
      if ((aside.lanes & lanes) != 0) aside.lanes |= lanes;
  }
}

Strand Causality::of_mbarrier(uint32_t block, uint32_t address) {
  const uint64_t key = uint64_t(block) << 32 | address;
  return mbarriers_.try_emplace(key, FIRST_MBARRIER | static_cast<Strand>(mbarriers_.size())).first->second;
}

void Causality::advance(Strand strand) {
  std::vector<Clock>& clocks = clocks_[strand >= FIRST_MBARRIER];
  const uint32_t index = strand & ~FIRST_MBARRIER;
  if (index >= clocks.size()) clocks.resize(index + 1);
  ++clocks[index];
}

View publish(Warp& warp, Mask lanes) {
  Causality& causality = warp.block->machine->causality;
  const Strand own = causality.strand(warp.number, StrandOf::warp);
  View view = warp.view.of_lanes(lanes);
  view.see(own, seen_of(warp, lanes, causality.now(own) + 1));
  see_copies(view, warp, causality, lanes);
  causality.advance(own);
  return view;
}

void acquire(Warp& warp, const View& view, Mask lanes) {
  if ((warp.live & ~lanes) == 0) {
    warp.view.join(view);
  } else {
    warp.view.set_aside(lanes, view);
  }
}

void acquire(Warp& warp, const View& view) { acquire(warp, view, warp.active); }

void synchronise(Warp& warp, Mask lanes) {
  Causality& causality = warp.block->machine->causality;
  const Strand own = causality.strand(warp.number, StrandOf::warp);
  const bool all = (warp.live & ~lanes) == 0;
  warp.view.see(own, seen_of(warp, lanes, causality.now(own) + 1));
  see_copies(warp.view, warp, causality, lanes);
  warp.view.share(lanes, all);
  causality.advance(own);
}

void fence_async(Warp& warp, Mask lanes) {
  Causality& causality = warp.block->machine->causality;
  const Strand own = causality.strand(warp.number, StrandOf::warp);
  const Seen fenced = seen_of(warp, lanes, causality.now(own) + 1);
  if ((warp.live & ~lanes) == 0) {
    warp.view.fence_async(own, fenced);
  } else {
    View view = warp.view.of_lanes(lanes);
    view.fence_async(own, fenced);
    warp.view.set_aside(lanes, view);
  }
  causality.advance(own);
}

}  // namespace gpu

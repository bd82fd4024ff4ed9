// Happens-before between what threads and asynchronous operations do, as clocks.
//
// A strand is something whose accesses are ordered among themselves: a warp (lanes between two warp barriers
// are not, see `Seen::lanes`), a warp's queue of asynchronous operations, or the operations that complete on
// one mbarrier. Its clock counts the stretches between the moments at which others may learn of it; that of a
// queue is the number of the group, plus one. A View says how much of every strand has been seen: an access
// is ordered before another one if the view of the latter covers it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "program.h"

namespace gpu {

using Strand = uint32_t;
using Clock = uint32_t;

struct Seen {
  Clock clock = 0;  // all before this clock
  Mask lanes = 0;   // and of these lanes
  Clock until = 0;  // what is before this one

  bool covers(Clock at, uint32_t lane) const {
    return at < clock || (at < until && (lane >= LANES || (lanes >> lane & 1) != 0));
  }
  // Of two that hold different lanes until different clocks, the sum says a little too much: a race is missed
  // then, and none invented.
  void join(const Seen& other) {
    clock = std::max(clock, other.clock);
    lanes |= other.lanes;
    until = std::max(until, other.until);
    if (until <= clock) lanes = until = 0;
  }
};

class View {
 public:
  void join(const View& other);
  // The lane is of the access that is asked about; one from LANES on: of some lane that is no longer known.
  bool covers(Strand strand, Clock clock, uint32_t lane) const { return generic(strand).covers(clock, lane); }
  // Also seen by the async proxy: a fence came between.
  bool covers_for_async(Strand strand, Clock clock, uint32_t lane) const;
  bool covers_all(Strand strand, Clock clock, bool for_async) const;  // of all lanes
  void see(Strand strand, Seen seen) { at(strand).generic.join(seen); }
  // What an asynchronous operation did itself: seen in both proxies.
  void see_for_async(Strand strand, Seen seen);
  // fence.proxy.async: what was seen counts for the async proxy too; `fenced` is what of one's own is.
  void fence_async(Strand own, Seen fenced);
  void clear();
  bool empty() const { return entries_.empty(); }

  // What only some lanes of a warp have acquired since its last warp barrier.
  struct Aside;
  const std::vector<Aside>& asides() const { return asides_; }
  void set_aside(Mask lanes, const View& view);
  // What these lanes have seen; and the same where they share it from now on.
  View of_lanes(Mask lanes) const;
  void share(Mask lanes, bool all);

 private:
  struct Entry {
    Strand strand;
    Seen generic, async;
  };
  const Seen& generic(Strand strand) const;
  const Entry* find(Strand strand) const;
  Entry& at(Strand strand);

  std::vector<Entry> entries_;  // by strand; strands that never met have none
  std::vector<Aside> asides_;
};

struct View::Aside {
  Mask lanes;
  View view;
};

enum class StrandOf : uint8_t { warp, cp_async, bulk_reads, bulk_writes, wgmma, count };

class Causality {
 public:
  void start(uint32_t warps_a_block) { warps_a_block_ = warps_a_block; }
  uint32_t warps_a_block() const { return warps_a_block_; }
  Strand strand(uint32_t warp_number, StrandOf which) const {
    return warp_number * static_cast<uint32_t>(StrandOf::count) + static_cast<uint32_t>(which);
  }
  static bool is_warp(Strand strand) {
    return strand < FIRST_MBARRIER && strand % static_cast<uint32_t>(StrandOf::count) == 0;
  }
  Strand of_mbarrier(uint32_t block, uint32_t address);  // one for each, made when first asked for
  Clock now(Strand strand) const {
    const std::vector<Clock>& clocks = clocks_[strand >= FIRST_MBARRIER];
    const uint32_t index = strand & ~FIRST_MBARRIER;
    return index < clocks.size() ? clocks[index] + 1 : 1;
  }
  void advance(Strand strand);  // a new stretch begins

 private:
  static constexpr Strand FIRST_MBARRIER = 0x80000000u;
  uint32_t warps_a_block_ = 1;
  std::unordered_map<uint64_t, Strand> mbarriers_;
  std::vector<Clock> clocks_[2];  // of warps and queues, and of mbarriers
};

struct Warp;
// What some lanes of a warp may hand to others by a release: all that they have seen, the warp's accesses
// before its last warp barrier, and those lanes' since. A new stretch of the warp begins.
View publish(Warp& warp, Mask lanes);
// Lanes see what a view covers; without a mask: those of the instruction that runs.
void acquire(Warp& warp, const View& view, Mask lanes);
void acquire(Warp& warp, const View& view);
// bar.warp.sync and stronger: all accesses of these lanes so far are ordered before what they do from here
// on.
void synchronise(Warp& warp, Mask lanes);
// fence.proxy.async by these lanes.
void fence_async(Warp& warp, Mask lanes);

}  // namespace gpu

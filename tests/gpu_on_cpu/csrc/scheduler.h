// Which warp runs next, and for how long: see Policy.
#pragma once

#include <vector>

#include "machine.h"

namespace gpu {

class Scheduler {
 public:
  explicit Scheduler(Machine& machine) : machine_(machine) {}
  void add(Block& block);
  void remove(Block& block);
  // A warp that can go on and for how many instructions it may; nullptr where no warp can.
  Warp* next(uint32_t* steps);
  bool empty() const { return warps_.empty(); }
  const std::vector<Warp*>& warps() const { return warps_; }

 private:
  bool ready(const Warp& warp) const;
  Warp* drawn(bool within_block);

  Machine& machine_;
  std::vector<Warp*> warps_;  // of all resident blocks, those that have not ended
  size_t at_ = 0;             // the one that ran last
};

// A warp that polled so often while nothing happened rests until something does.
constexpr uint32_t MOST_POLLS = 8;

}  // namespace gpu

#include "machine.h"

#include <algorithm>
#include <numeric>

#include "memory.h"
#include "scheduler.h"
#include "start.h"
#include "wgmma.h"

namespace gpu {
namespace {

constexpr uint32_t FRUITLESS_ROUNDS = 64;  // in which polling warps may find out that they polled enough

class Run {
 public:
  Run(Machine& machine, Course& course) : machine_(machine), course_(course), scheduler_(machine) {}

  void all() {
    const uint32_t threads = static_cast<uint32_t>(count_of(machine_.launch.threads));
    plan(threads);
    while (next_block_ < order_.size() || !scheduler_.empty()) {
      for (auto& slot : machine_.resident)
        if (!slot && next_block_ < order_.size()) start(slot, threads);
      uint32_t steps = 0;
      if (Warp* warp = scheduler_.next(&steps)) {
        turn(*warp, steps);
        if (machine_.launch.when == When::drawn) perform_some();
      } else {
        unlock();
      }
    }
  }

  // What a warp that can go on does where no warp can: it looks at something again and again.
  std::string polls(const Warp& warp) const {
    if (warp.polled == NONE) return "";
    return ": polls by " + std::string(machine_.kernel->instructions[warp.polled].text);
  }

  // `locked`: no warp can go on.
  void note_standing(bool locked) {
    for (const Warp* warp : scheduler_.warps()) {
      for (const Group& group : warp->groups) {
        const Instruction& at = machine_.kernel->instructions[group.pc];
        course_.standing.push_back(text_of(name_of(*warp), " lanes ", std::hex, group.lanes, " at ",
                                           place_of(*machine_.program, at),
                                           group.stuck ? ": waits for " + warp->waits_for
                                           : locked    ? polls(*warp)
                                                       : ""));
      }
    }
  }

 private:
  void plan(uint32_t threads) {
    const Launch& launch = machine_.launch;
    const uint64_t blocks = count_of(launch.grid);
    if (launch.grid[0] > 0x7fffffffu || launch.grid[1] > 65535 || launch.grid[2] > 65535 || blocks == 0)
      fail(Kind::limits, "a grid of ", launch.grid[0], " x ", launch.grid[1], " x ", launch.grid[2],
           " blocks");
    const uint32_t each = blocks_a_multiprocessor(*machine_.kernel, launch);
    const uint64_t most = uint64_t(each) * launch.limits.multiprocessors;
    if (each == 0) fail(Kind::limits, "no multiprocessor has room for a block");
    if (launch.cooperative && blocks > most)
      fail(Kind::limits, "a cooperative grid of ", blocks, " blocks, of which ", most, " are resident");
    machine_.resident.resize(std::min(blocks, most));
    course_.resident = static_cast<uint32_t>(machine_.resident.size());
    order_.resize(blocks);
    std::iota(order_.begin(), order_.end(), 0u);
    // No order of starting is promised.
    if (launch.policy != Policy::round_robin) std::shuffle(order_.begin(), order_.end(), machine_.random);
    machine_.executed.resize(machine_.kernel->instructions.size());
    machine_.touches_wgmma = touches_wgmma(*machine_.kernel);
    machine_.causality.start((threads + LANES - 1) / LANES);
  }

  void start(std::unique_ptr<Block>& slot, uint32_t threads) {
    slot = std::make_unique<Block>();
    Block& block = *slot;
    const Launch& launch = machine_.launch;
    const uint32_t warps = (threads + LANES - 1) / LANES;
    block.machine = &machine_;
    block.number = order_[next_block_++];
    block.x = block.number % launch.grid[0];
    block.y = block.number / launch.grid[0] % launch.grid[1];
    block.z = block.number / launch.grid[0] / launch.grid[1];
    block.slot = static_cast<uint32_t>(&slot - machine_.resident.data());
    block.shared.resize(machine_.kernel->shared_bytes + launch.dynamic_shared);
    block.frames.resize(size_t(warps) * machine_.kernel->frame_bytes);
    block.warps.resize(warps);
    block.live_warps = warps;
    for (uint32_t i = 0; i < warps; ++i) {
      Warp& warp = block.warps[i];
      warp.block = &block;
      warp.index = i;
      warp.number = block.number * warps + i;
      start_warp(warp, threads);
    }
    machine_.memory->add_shared(block);
    scheduler_.add(block);
    ++machine_.events;
  }

  void turn(Warp& warp, uint32_t steps) {
    if (machine_.events != warp.looked_at) warp.polls = 0;
    for (uint32_t i = 0; i < steps && warp.live != 0 && warp.polls < MOST_POLLS; ++i)
      if (!step(warp)) return;
    if (warp.live == 0) ended(warp);
  }

  // The group that runs: the one that is farthest behind, so that lanes meet again; now and then another one.
  Group* choose(Warp& warp) {
    if (warp.groups.size() == 1) return warp.groups[0].stuck ? nullptr : &warp.groups[0];
    Group* found = nullptr;
    const bool any = machine_.launch.policy == Policy::random && machine_.random() % 8 == 0;
    for (Group& group : warp.groups)
      if (!group.stuck && (found == nullptr || (any ? machine_.random() % 2 == 0 : group.pc < found->pc)))
        found = &group;
    return found;
  }

  // One instruction. False where the warp cannot go on for now.
  bool step(Warp& warp) {
    Group* group = choose(warp);
    if (group == nullptr) return false;
    const Instruction& at = machine_.kernel->instructions[group->pc];
    warp.at_group = static_cast<uint32_t>(group - warp.groups.data());
    warp.pc = group->pc;
    warp.group_lanes = group->lanes;
    warp.active = group->lanes;
    course_.culprit = &warp;
    course_.pc = warp.pc;
    if (at.guard != NONE) warp.active &= at.guard_negated ? ~warp.mask(at.guard) : warp.mask(at.guard);
    Outcome outcome = Outcome::next;
    if (warp.active != 0) {
      if (machine_.touches_wgmma[at.pc]) check_in_flight(warp, at);
      outcome = at.step(warp, at);
    }
    if (outcome == Outcome::waits) {
      group->stuck = true;
      return choose(warp) != nullptr;
    }
    count(at);
    if (outcome == Outcome::polled) {
      if (machine_.events != warp.looked_at) warp.polls = 0;
      warp.looked_at = machine_.events;
      ++warp.polls;
      warp.polled = at.pc;
    }
    if (outcome != Outcome::jumped) ++group->pc;
    if (warp.groups.size() > 1) meet(warp);
    return true;
  }

  void count(const Instruction& at) {
    ++machine_.executed[at.pc];
    if (++machine_.steps == machine_.launch.most_steps)
      fail(Kind::deadlock, "no end after ", machine_.steps, " instructions of warps");
  }

  // Groups that stand at one instruction become one; the others may go on where they waited for lanes of
  // these.
  static void meet(Warp& warp) {
    std::vector<Group>& groups = warp.groups;
    const size_t before = groups.size();
    for (size_t i = 0; i < groups.size(); ++i) {
      for (size_t j = i + 1; j < groups.size();) {
        if (groups[j].pc == groups[i].pc) {
          groups[i].lanes |= groups[j].lanes;
          groups.erase(groups.begin() + j);
        } else {
          ++j;
        }
      }
    }
    if (groups.size() != before) warp.unstick();
  }

  void ended(Warp& warp) {
    for (Queue& queue : warp.queues)
      while (!queue.pending.empty()) perform_first(queue);
    ++machine_.events;
    Block& block = *warp.block;
    if (--block.live_warps != 0) return;
    for (const Pending& operation : machine_.unbound)
      if (operation.warp->block == &block)
        fail(Kind::in_flight, "the block ended before a copy into its shared memory was waited for: ",
             place_of(*machine_.program, machine_.kernel->instructions[operation.pc]));
    scheduler_.remove(block);
    machine_.memory->end_shared(block);
    machine_.resident[block.slot].reset();
  }

  void perform_first(Queue& queue) {
    Pending operation = std::move(queue.pending.front().second);
    queue.pending.pop_front();
    machine_.perform(std::move(operation));
  }

  void perform_unbound() {
    const size_t i = machine_.launch.when == When::drawn ? machine_.random() % machine_.unbound.size() : 0;
    Pending operation = std::move(machine_.unbound[i]);
    machine_.unbound.erase(machine_.unbound.begin() + i);
    machine_.perform(std::move(operation));
  }

  // Now and then an operation that was put off is done.
  void perform_some() {
    if (!machine_.unbound.empty() && machine_.random() % 32 == 0) perform_unbound();
    const std::vector<Warp*>& warps = scheduler_.warps();
    if (warps.empty()) return;
    Warp& warp = *warps[machine_.random() % warps.size()];
    for (Queue& queue : warp.queues)
      if (!queue.pending.empty() && machine_.random() % 8 == 0) perform_first(queue);
  }

  // No warp can go on: asynchronous work is done, or warps that poll may see that they did so often enough.
  void unlock() {
    if (!machine_.unbound.empty()) {
      perform_unbound();
      return;
    }
    if (quiet_since_ != machine_.events) fruitless_ = 0;
    quiet_since_ = machine_.events;
    bool polling = false;
    for (Warp* warp : scheduler_.warps()) {
      polling = polling || warp->polls != 0;
      warp->polls = 0;
    }
    if (!polling || ++fruitless_ > FRUITLESS_ROUNDS) stuck();
  }

  [[noreturn]] void stuck() {
    for (const Warp* warp : scheduler_.warps()) {
      course_.culprit = warp;
      const Group& group = warp->groups.front();
      course_.pc = group.stuck || warp->polled == NONE ? group.pc : warp->polled;
      if (warp->groups.size() > 1 && group.stuck)
        fail(Kind::barrier, "lanes of a warp that went different ways do not all reach it: waits for ",
             warp->waits_for);
    }
    fail(Kind::deadlock, "no warp can go on; ", order_.size() - next_block_, " blocks wait for room");
  }

  Machine& machine_;
  Course& course_;
  Scheduler scheduler_;
  std::vector<uint32_t> order_;  // blocks, as they start
  size_t next_block_ = 0;
  uint64_t quiet_since_ = 0;
  uint32_t fruitless_ = 0;
};

}  // namespace

void run(Machine& machine, Course& course) {
  machine.course = &course;
  machine.random.seed(machine.launch.seed);
  Run run(machine, course);
  try {
    run.all();
  } catch (const Fault& fault) {
    if (fault.kind == Kind::deadlock || fault.kind == Kind::barrier)
      run.note_standing(fault.kind == Kind::deadlock);
    throw;
  }
}

void Machine::perform(Pending operation) {
  const Warp* const culprit = course->culprit;
  const uint32_t pc = course->pc;
  course->culprit = operation.warp;
  course->pc = operation.pc;
  operation.perform();
  course->culprit = culprit;
  course->pc = pc;
  ++events;
}

void Machine::issue(Warp& warp, QueueOf which, std::function<void()> operation) {
  Queue& queue = warp.queues[static_cast<int>(which)];
  Pending pending{&warp, warp.pc, std::move(operation)};
  const bool now = launch.when == When::early || (launch.when == When::drawn && random() % 2 == 0);
  if (now && queue.pending.empty()) {
    perform(std::move(pending));
  } else {
    queue.pending.emplace_back(queue.open, std::move(pending));
  }
}

void Machine::issue(Warp& warp, std::function<void()> operation) {
  Pending pending{&warp, warp.pc, std::move(operation)};
  if (launch.when == When::early || (launch.when == When::drawn && random() % 2 == 0)) {
    perform(std::move(pending));
  } else {
    unbound.push_back(std::move(pending));
  }
}

void Machine::finish(Warp& warp, QueueOf which, uint32_t group) {
  Queue& queue = warp.queues[static_cast<int>(which)];
  while (!queue.pending.empty() && queue.pending.front().first < group) {
    Pending operation = std::move(queue.pending.front().second);
    queue.pending.pop_front();
    perform(std::move(operation));
  }
  queue.finished = std::max(queue.finished, group);
}

bool together(Warp& warp, Mask lanes) {
  const Mask missing = lanes & warp.live & ~warp.group_lanes;
  if (missing != 0) warp.waits_for = text_of("lanes ", std::hex, missing, " of its warp");
  return missing == 0;
}

std::string name_of(const Warp& warp) { return text_of("block ", warp.block->number, " warp ", warp.index); }

std::string place_of(const Program& program, const Instruction& at) {
  std::string place(at.text);
  if (at.line != 0 && at.file < program.files.size())
    place += text_of(" (", program.files[at.file], ":", at.line, ")");
  return place;
}

}  // namespace gpu

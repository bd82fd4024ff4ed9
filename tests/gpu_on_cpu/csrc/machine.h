// The state of a launch: its blocks, their warps, and what the scheduler decides.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "causality.h"
#include "fault.h"
#include "mbarrier.h"
#include "program.h"
#include "provenance.h"

namespace gpu {

struct Machine;
struct Block;
class Memory;

// Lanes of a warp that stand at one instruction. A warp whose lanes went different ways has several groups;
// groups that come to stand at one instruction become one again.
struct Group {
  uint32_t pc;
  Mask lanes;
  bool stuck = false;  // its instruction said Outcome::waits; whoever changes that clears it
};

// An asynchronous operation that was issued and not yet performed. The scheduler performs it at once, at a
// moment drawn, or when something waits for it. Operations of one queue are performed in order.
struct Pending {
  Warp* warp;   // that issued it
  uint32_t pc;  // of that instruction
  std::function<void()> perform;
};

// Rows that an operation in flight reads or writes.
struct RowsInFlight {
  Row first, end;  // [first, end) of the frame
  bool written;    // by the operation; otherwise read
  uint32_t group;  // of its queue
  uint32_t pc;     // of the instruction that issued it
};

// Queues of operations in groups, by what closes and awaits a group: cp.async, cp.async.bulk and wgmma.
struct Queue {
  uint32_t open = 0;                                 // number of the group that operations join now
  uint32_t finished = 0;                             // groups [0, finished) were waited for
  std::deque<std::pair<uint32_t, Pending>> pending;  // (group, operation), in order
};

enum class QueueOf : uint8_t { cp_async, bulk, wgmma, count };

struct Warp {
  Block* block = nullptr;
  uint32_t index = 0;   // in its block
  uint32_t number = 0;  // among all warps of the launch: block's number * warps a block + index
  Mask exists = 0;      // lanes that the block has
  Mask live = 0;        // of those, the ones that have not ended

  std::vector<Group> groups;
  uint32_t at_group = 0;  // the one that runs
  Mask group_lanes = 0;   // its lanes
  Mask active = 0;        // of those, the ones whose guard holds
  uint32_t pc = 0;        // of the instruction that runs

  std::byte* frame = nullptr;
  std::vector<std::byte> local;  // .local memory: lane after lane, each kernel->local_bytes

  View view;  // what its lanes have seen, see causality.h
  Queue queues[static_cast<int>(QueueOf::count)];
  std::vector<RowsInFlight> in_flight;
  std::vector<uint64_t> touched;  // when each register was, see in_flight.cpp
  uint32_t fences = 0;            // of wgmma, so far

  uint32_t barrier = NONE;  // the named barrier that it arrived at and waits for
  bool passed = false;      // and that has let it through, with these results of .red
  bool barrier_all = false, barrier_any = false;
  uint32_t barrier_count = 0;

  uint64_t tried = 0;  // mbarrier and phase that a try_wait found under way last

  uint64_t looked_at = 0;  // machine.events when an instruction last polled
  uint32_t polls = 0;      // how often it polled since
  uint32_t polled = NONE;  // the pc of that instruction
  std::string waits_for;   // words for a report; set by the instruction that waits

  template <class T>
  T* row(Row offset) const {
    return reinterpret_cast<T*>(frame + offset);
  }
  void unstick() {
    for (Group& group : groups) group.stuck = false;
  }
  Mask& mask(Row offset) const { return *reinterpret_cast<Mask*>(frame + offset); }
};

// bar.sync and its kin: one of the block's 16.
struct NamedBarrier {
  uint32_t expected = 0;  // threads of the generation under way; 0: nobody came yet
  uint32_t arrived = 0;   // threads
  View published;         // of all that arrived
  std::vector<Warp*> waiters;
  bool all = true, any = false;  // of .red: over the threads' predicates
  uint32_t count = 0;
};

struct Block {
  Machine* machine = nullptr;
  uint32_t number = 0;  // x fastest
  uint32_t x = 0, y = 0, z = 0;
  uint32_t slot = 0;  // of the resident blocks: also names its multiprocessor
  std::vector<std::byte> shared;
  Provenance provenance;  // of its bytes
  std::vector<Warp> warps;
  uint32_t live_warps = 0;
  NamedBarrier barriers[16];
  std::map<uint32_t, MBarrier> mbarriers;  // by their offset in shared memory
  std::vector<std::byte> frames;
};

struct Limits {  // of an architecture: `limits.py` has the numbers
  uint32_t multiprocessors = 0;
  uint32_t registers = 0;           // a multiprocessor
  uint32_t shared_bytes = 0;        // a multiprocessor
  uint32_t shared_block_bytes = 0;  // most that a block can ask for
  uint32_t shared_reserved = 0;     // of each block, taken by the system
  uint32_t warps = 0, blocks = 0;   // resident on a multiprocessor
  uint32_t threads_a_block = 0;
};

enum class Policy : uint8_t {
  round_robin,  // one instruction of each warp in turn
  random,       // a warp drawn, for a drawn number of instructions
  warp_first,   // one warp, as far as it gets
  block_first,  // one block, as far as it gets, its warps drawn
};
enum class When : uint8_t { early, late, drawn };  // when asynchronous work is performed

struct Launch {
  uint32_t grid[3] = {1, 1, 1}, threads[3] = {32, 1, 1};
  uint32_t dynamic_shared = 0;
  uint32_t registers = 0;    // a thread, as ptxas or the test says
  bool cooperative = false;  // all blocks have to be resident
  std::vector<std::byte> params;
  Limits limits;
  Policy policy = Policy::round_robin;
  When when = When::early;
  uint64_t seed = 0;
  uint64_t most_steps = 0;  // warp instructions before the run is given up; 0: no bound
};

struct Course;

struct Machine {
  const Program* program = nullptr;
  const Kernel* kernel = nullptr;
  Launch launch;
  Memory* memory = nullptr;
  Causality causality;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Block>> resident;  // by slot; empty where a block has ended
  // Grows with everything that a polling warp may see: an mbarrier's arrival or completion, a finished
  // operation, a store or atomic that changed shared or global memory.
  uint64_t events = 0;
  uint64_t steps = 0;
  Course* course = nullptr;
  std::vector<uint8_t> touches_wgmma;  // by pc, see wgmma.h
  std::vector<uint64_t> executed;      // warp instructions by pc

  // Hands an operation over: it is performed now or later, at the latest by `finish`.
  void issue(Warp& warp, QueueOf queue, std::function<void()> perform);
  // The same for one that no queue waits for, since an mbarrier does.
  void issue(Warp& warp, std::function<void()> perform);
  // Performs what is left of groups before `group` of a warp's queue, and counts them as waited for.
  void finish(Warp& warp, QueueOf queue, uint32_t group);
  std::deque<Pending> unbound;  // those of mbarriers
  void perform(Pending operation);
};

// Runs a launch to its end. Throws Fault; `culprit` is then the warp that did it, or nullptr, and `standing`
// where all warps stand.
struct Course {
  uint32_t resident = 0;  // blocks at a time
  const Warp* culprit = nullptr;
  uint32_t pc = 0;  // of the instruction at fault
  std::vector<std::string> standing;
};
void run(Machine& machine, Course& course);

// Whether the group that runs holds all live lanes of `lanes`: what .sync and .aligned instructions need.
// Where it is false, the step returns Outcome::waits.
bool together(Warp& warp, Mask lanes);

// "block 3 warp 1", and the instruction with its source line.
std::string name_of(const Warp& warp);
std::string place_of(const Program& program, const Instruction& at);

}  // namespace gpu

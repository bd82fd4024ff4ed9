// Registers of wgmma: nobody may touch them between an operation and the wait for it, and a wgmma.fence has
// to be between what touches them and the operation that takes them.
#include <algorithm>
#include <unordered_set>

#include "wgmma.h"

namespace gpu {
namespace {

constexpr uint32_t APART = 64;  // rows are at least so many bytes apart

[[noreturn]] void fail_for(const Warp& warp, uint32_t other, const char* what) {
  throw Fault{Kind::in_flight, what, -1, other, int(warp.block->number), int(warp.index)};
}

const Instruction& instruction(const Warp& warp, uint32_t pc) {
  return warp.block->machine->kernel->instructions[pc];
}

// Which instruction touched a row last since the last wgmma.fence: its pc, or NONE.
uint32_t touched_by(const Warp& warp, Row row) {
  const uint64_t note = row / APART < warp.touched.size() ? warp.touched[row / APART] : 0;
  return note >> 32 == warp.fences ? static_cast<uint32_t>(note) : NONE;
}

void note_touched(Warp& warp, const Instruction& at, uint32_t count) {
  warp.touched.resize(warp.block->machine->kernel->frame_bytes / APART);
  for (uint32_t i = 0; i < count; ++i)
    if (at.rows[i] != NONE) warp.touched[at.rows[i] / APART] = uint64_t(warp.fences) << 32 | at.pc;
}

// Operations of one shape on the same accumulators follow one another in order.
bool chains(const Instruction& a, const Instruction& b) {
  const Product &p = wgmma_of(a)->product, &q = wgmma_of(b)->product;
  return p.n == q.n && p.k == q.k && p.sum == q.sum && std::equal(a.rows, a.rows + a.results, b.rows);
}

bool overlap(const RowsInFlight& in_flight, const std::vector<std::pair<Row, Row>>& ranges) {
  return std::any_of(ranges.begin(), ranges.end(), [&](const auto& range) {
    return range.first < in_flight.end && in_flight.first < range.second;
  });
}

}  // namespace

std::vector<uint8_t> touches_wgmma(const Kernel& kernel) {
  std::unordered_set<Row> taken;
  for (const Instruction& at : kernel.instructions) {
    if (const Wgmma* plan = wgmma_of(at)) {
      const uint32_t b = at.results + (plan->a_shared ? 0 : 4);
      taken.insert(at.rows, at.rows + b);
    }
  }
  std::vector<uint8_t> touches(kernel.instructions.size());
  for (const Instruction& at : kernel.instructions)
    touches[at.pc] = wgmma_of(at) == nullptr && std::any_of(at.rows, at.rows + at.row_count,
                                                            [&](Row row) { return taken.count(row) != 0; });
  return touches;
}

void check_in_flight(Warp& warp, const Instruction& at) {
  for (const RowsInFlight& in_flight : warp.in_flight)
    for (uint32_t i = 0; i < at.row_count; ++i)
      if (at.rows[i] >= in_flight.first && at.rows[i] < in_flight.end)
        fail_for(warp, in_flight.pc,
                 in_flight.written ? "touches an accumulator of a wgmma.mma_async that was not waited for"
                                   : "touches a register of A of a wgmma.mma_async that was not waited for");
  note_touched(warp, at, at.row_count);
}

void check_issue(Warp& warp, const Instruction& at, const Wgmma& plan) {
  for (const RowsInFlight& in_flight : warp.in_flight) {
    const bool accumulators = overlap(in_flight, plan.accumulators), a = overlap(in_flight, plan.a);
    if (in_flight.written ? a || (accumulators && !chains(at, instruction(warp, in_flight.pc)))
                          : accumulators)
      fail_for(warp, in_flight.pc, "takes registers of another wgmma.mma_async that was not waited for");
  }
  if (warp.fences == 0) fail(Kind::in_flight, "no wgmma.fence came before the first wgmma.mma_async");
  const uint32_t b = at.results + (plan.a_shared ? 0 : 4);
  for (uint32_t i = 0; i < b; ++i) {
    const uint32_t pc = touched_by(warp, at.rows[i]);
    if (pc == NONE) continue;
    const Instruction& other = instruction(warp, pc);
    if (wgmma_of(other) == nullptr || i >= at.results || !chains(at, other))
      fail_for(warp, pc, "takes a register that was touched since the last wgmma.fence");
  }
  note_touched(warp, at, at.results);
}

void note_in_flight(Warp& warp, const Instruction& at, const Wgmma& plan) {
  const uint32_t group = warp.queues[static_cast<int>(QueueOf::wgmma)].open;
  const auto note = [&](const auto& ranges, bool written) {
    for (const auto& [first, end] : ranges) {
      const auto same =
          std::find_if(warp.in_flight.begin(), warp.in_flight.end(), [&](const RowsInFlight& other) {
            return other.first == first && other.end == end && other.written == written;
          });
      if (same == warp.in_flight.end()) {
        warp.in_flight.push_back({first, end, written, group, at.pc});
      } else {
        same->group = group;
        same->pc = at.pc;
      }
    }
  };
  note(plan.accumulators, true);
  note(plan.a, false);
}

}  // namespace gpu

#include "mbarrier.h"

#include <algorithm>
#include <utility>

#include "barriers.h"
#include "control.h"
#include "memory.h"

namespace gpu {
namespace {

MBarrier& found(Block& block, uint32_t address) {
  const auto at = block.mbarriers.find(address);
  if (at == block.mbarriers.end())
    fail(Kind::barrier, "no mbarrier was initialised at shared address ", address);
  return at->second;
}

void check_phase(Block& block, uint32_t address, MBarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.completed = barrier.arriving;
  barrier.arriving.clear();
  barrier.pending = barrier.expected;
  ++barrier.phase;
  Causality& causality = block.machine->causality;
  causality.advance(causality.of_mbarrier(block.number, address));
  for (Warp& warp : block.warps) warp.unstick();
  ++block.machine->events;
}

void count_arrivals(Block& block, uint32_t address, MBarrier& barrier, uint32_t count) {
  if (count > barrier.pending)
    fail(Kind::barrier, count, " arrivals at the mbarrier at ", address, ", whose phase waits for ",
         barrier.pending);
  barrier.pending -= count;
  ++block.machine->events;
  check_phase(block, address, barrier);
}

// A warp uses a barrier: its initialisation has to be ordered before.
MBarrier& used(Warp& warp, const Instruction& at, uint32_t address, uint32_t lane) {
  MBarrier& barrier = found(*warp.block, address);
  const Access access = access_of(warp, at);
  const MBarrier::Use& made = barrier.made;
  if (made.strand != access.strand && !warp.view.covers(made.strand, made.clock, made.lane))
    throw Fault{Kind::race,
                "an mbarrier is used and nothing orders that after its initialisation",
                int(lane),
                made.pc,
                int(warp.block->number),
                int(made.warp)};
  const MBarrier::Use use{access.strand, access.clock, lane, at.pc, warp.index};
  const auto same = std::find_if(barrier.uses.begin(), barrier.uses.end(),
                                 [&](const MBarrier::Use& other) { return other.strand == use.strand; });
  if (same == barrier.uses.end()) {
    barrier.uses.push_back(use);
  } else {
    *same = use;
  }
  return barrier;
}

void check_ended(Warp& warp, const MBarrier& barrier, uint32_t lane) {
  for (const MBarrier::Use& use : barrier.uses) {
    if (use.warp == warp.index || warp.view.covers(use.strand, use.clock, use.lane)) continue;
    throw Fault{Kind::race,
                "an mbarrier ends, or starts anew, and nothing orders that after its use",
                int(lane),
                use.pc,
                int(warp.block->number),
                int(use.warp)};
  }
}

uint32_t address_of(const Warp& warp, const Instruction& at, uint32_t lane) {
  const Row* rows = at.rows + at.results;
  const bool wide = at.numbers[0] != 0;
  const uint64_t base = wide ? warp.row<uint64_t>(rows[0])[lane] : warp.row<uint32_t>(rows[0])[lane];
  const auto [space, address] =
      Memory::resolve(wide ? Space::generic : Space::shared, base + static_cast<uint64_t>(at.numbers[1]));
  if (space != Space::shared || address + 8 > warp.block->shared.size())
    throw Fault{Kind::bounds, text_of("an mbarrier at ", address, ", outside of shared memory"), int(lane)};
  if (address % 8 != 0) throw Fault{Kind::misaligned, text_of("an mbarrier at ", address), int(lane)};
  return static_cast<uint32_t>(address);
}

// rows: address, count. numbers: generic address, offset.
Outcome init(Warp& warp, const Instruction& at) {
  for_lanes(warp.active, [&](uint32_t lane) {
    const uint32_t address = address_of(warp, at, lane), count = warp.row<uint32_t>(at.rows[1])[lane];
    if (count == 0 || count >= 1u << 20)
      throw Fault{Kind::barrier, text_of(count, " arrivals a phase"), int(lane)};
    const Access access = access_of(warp, at);
    MBarrier& barrier = warp.block->mbarriers[address];
    check_ended(warp, barrier, lane);
    barrier = MBarrier{};
    barrier.expected = barrier.pending = count;
    barrier.made = {access.strand, access.clock, lane, at.pc, warp.index};
  });
  return Outcome::next;
}

Outcome invalidate(Warp& warp, const Instruction& at) {
  for_lanes(warp.active, [&](uint32_t lane) {
    const uint32_t address = address_of(warp, at, lane);
    check_ended(warp, used(warp, at, address, lane), lane);
    warp.block->mbarriers.erase(address);
  });
  return Outcome::next;
}

enum Arrival { WIDE, OFFSET, EXPECTS, DROPS, RELEASES, HAS_COUNT };

// rows: state, address, [count or bytes].
Outcome arrive_all(Warp& warp, const Instruction& at) {
  for_lanes(warp.active, [&](uint32_t lane) {
    const uint32_t address = address_of(warp, at, lane);
    MBarrier& barrier = used(warp, at, address, lane);
    const uint32_t number = at.numbers[HAS_COUNT] ? warp.row<uint32_t>(at.rows[2])[lane] : 1;
    const uint64_t phase = barrier.phase;
    if (at.numbers[RELEASES]) barrier.arriving.join(publish(warp, Mask(1) << lane));
    if (at.numbers[EXPECTS]) barrier.bytes += number;
    const uint32_t count = at.numbers[EXPECTS] ? 1 : number;
    if (at.numbers[DROPS]) barrier.expected -= std::min(count, barrier.expected);
    if (at.rows[0] != NONE) warp.row<uint64_t>(at.rows[0])[lane] = phase;
    count_arrivals(*warp.block, address, barrier, count);
  });
  return Outcome::next;
}

// rows: address, bytes. Without an arrival.
template <int sign>
Outcome change_bytes(Warp& warp, const Instruction& at) {
  for_lanes(warp.active, [&](uint32_t lane) {
    const uint32_t address = address_of(warp, at, lane);
    MBarrier& barrier = used(warp, at, address, lane);
    barrier.bytes += sign * int64_t(warp.row<uint32_t>(at.rows[1])[lane]);
    check_phase(*warp.block, address, barrier);
  });
  return Outcome::next;
}

enum Test { TEST_WIDE, TEST_OFFSET, PARITY, ACQUIRES, TRIES };

// rows: predicate, address, state or parity.
Outcome test(Warp& warp, const Instruction& at) {
  Mask done = 0;
  uint32_t last_address = NONE;
  MBarrier* barrier = nullptr;
  bool acquired = false;
  for_lanes(warp.active, [&](uint32_t lane) {
    const uint32_t address = address_of(warp, at, lane);
    if (address != last_address) {
      barrier = &used(warp, at, address, lane);
      last_address = address;
      acquired = !at.numbers[ACQUIRES];
    }
    const bool ended = at.numbers[PARITY] ? (barrier->phase & 1) != (warp.row<uint32_t>(at.rows[2])[lane] & 1)
                                          : barrier->phase != warp.row<uint64_t>(at.rows[2])[lane];
    if (!ended) return;
    done |= Mask(1) << lane;
    if (!acquired) acquire(warp, barrier->completed);
    acquired = true;
  });
  Mask& to = warp.mask(at.rows[0]);
  to = (to & ~warp.active) | done;
  if (done == warp.active) return Outcome::next;
  if (!at.numbers[TRIES]) return Outcome::polled;
  // A try may end without the phase, as the first one does here; another one waits for it.
  const uint64_t tried = uint64_t(last_address) << 32 | (barrier->phase + 1);
  if (std::exchange(warp.tried, tried) != tried) return Outcome::polled;
  warp.waits_for = text_of("phase ", barrier->phase, " of the mbarrier at ", last_address, ", which wants ",
                           barrier->pending, " arrivals and ", barrier->bytes, " bytes");
  return Outcome::waits;
}

Row mbarrier_address(const Statement& given, const Operand& operand, Build& build, int64_t* wide,
                     int64_t* offset) {
  given.has("shared");
  given.has("shared::cta");
  const Row row = build.address(operand, offset);
  Operand base;
  base.is = Operand::Is::reg;
  base.name = operand.name;
  *wide = base.name.starts_with('%') && build.width_of(base) == 8;
  return row;
}

bool decode_arrival(const Statement& given, Build& build, Instruction& to) {
  const bool expects = given.has("expect_tx"), drops = given.has("arrive_drop");
  const bool arrives = given.has("arrive") || drops;
  const size_t count = given.operands.size();
  if (given.has("noComplete") || given.has("shared::cluster")) return false;
  const bool releases = !given.has("relaxed");
  given.has("release");
  if (!(given.has("cta") || given.has("cluster")) && !releases) return false;
  int64_t wide = 0, offset = 0;
  if (!arrives) {
    if (count != 2) return false;
    const Row address = mbarrier_address(given, given.operands[0], build, &wide, &offset);
    finish(build, to, expects ? change_bytes<1> : change_bytes<-1>, 0,
           {address, build.row(given.operands[1], 4)}, {wide, offset});
    return expects || given.has("complete_tx");
  }
  if (count < 2 || count > 3 || (expects && count != 3)) return false;
  const bool dropped = given.operands[0].is == Operand::Is::sink;
  std::vector<Row> rows = {dropped ? NONE : build.row(given.operands[0], 8)};
  rows.push_back(mbarrier_address(given, given.operands[1], build, &wide, &offset));
  if (count == 3) rows.push_back(build.row(given.operands[2], 4));
  finish(build, to, arrive_all, 1, std::move(rows), {wide, offset, expects, drops, releases, count == 3});
  return true;
}

bool decode_test(const Statement& given, Build& build, Instruction& to) {
  const size_t count = given.operands.size();
  const bool hinted = given.has("try_wait") && count == 4;
  if (count != 3 && !hinted) return false;
  const bool parity = given.has("parity"), acquires = !given.has("relaxed");
  given.has("acquire");
  given.has("cta");
  int64_t wide = 0, offset = 0;
  const Row address = mbarrier_address(given, given.operands[1], build, &wide, &offset);
  std::vector<Row> rows = {build.predicate(given.operands[0]), address,
                           build.row(given.operands[2], parity ? 4 : 8)};
  if (hinted) rows.push_back(build.row(given.operands[3], 4));
  finish(build, to, test, 1, std::move(rows), {wide, offset, parity, acquires, given.has("try_wait")});
  return true;
}

bool decode(const Statement& given, Build& build, Instruction& to) {
  if (!given.has("b64")) return false;
  if (given.has("test_wait") || given.has("try_wait")) return decode_test(given, build, to);
  if (given.has("init") || given.has("inval")) {
    const bool starts = given.parts[1] == "init";
    if (given.operands.size() != (starts ? 2u : 1u)) return false;
    int64_t wide = 0, offset = 0;
    std::vector<Row> rows = {mbarrier_address(given, given.operands[0], build, &wide, &offset)};
    if (starts) rows.push_back(build.row(given.operands[1], 4));
    finish(build, to, starts ? init : invalidate, 0, std::move(rows), {wide, offset});
    return true;
  }
  return decode_arrival(given, build, to);
}

}  // namespace

void complete_tx(Block& block, uint32_t address, uint64_t bytes, const View& seen) {
  MBarrier& barrier = found(block, address);
  barrier.arriving.join(seen);
  barrier.bytes -= static_cast<int64_t>(bytes);
  check_phase(block, address, barrier);
}

void arrive(Block& block, uint32_t address, uint32_t count, const View& seen) {
  MBarrier& barrier = found(block, address);
  barrier.arriving.join(seen);
  count_arrivals(block, address, barrier, count);
}

void expect_more(Block& block, uint32_t address, uint32_t count) { found(block, address).pending += count; }

void add_mbarriers(Decoders& decoders) { decoders["mbarrier"] = decode; }

}  // namespace gpu

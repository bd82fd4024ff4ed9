// bar.sync, bar.arrive, bar.red and their twins barrier.cta.*: each warp counts as 32 threads.
#include "barriers.h"

#include "control.h"
#include "lanes.h"

namespace gpu {
namespace {

enum Number { DOES, REDUCTION, HAS_COUNT, ALIGNED, NEGATED };
enum Does : int64_t { sync, arrive, reduce };
enum Reduction : int64_t { none, popc, all, any };

uint32_t threads_of(const Block& block) { return static_cast<uint32_t>(block.warps.size()) * LANES; }

// One value for all lanes that take part.
uint32_t uniform(const Warp& warp, Row row, const char* what) {
  const uint32_t* values = warp.row<uint32_t>(row);
  const uint32_t value = values[__builtin_ctz(warp.active)];
  for_lanes(warp.active, [&](uint32_t lane) {
    if (values[lane] != value) throw Fault{Kind::barrier, text_of("lanes give different ", what), int(lane)};
  });
  return value;
}

// Every barrier at which warps wait can still be reached by as many threads as it waits for.
void check_reachable(const Block& block) {
  uint32_t live = 0;
  for (const Warp& warp : block.warps) live += warp.live != 0;
  for (const NamedBarrier& barrier : block.barriers) {
    if (barrier.waiters.empty()) continue;
    const size_t others = live - barrier.waiters.size();
    if (barrier.expected - barrier.arrived > others * LANES)
      fail(Kind::barrier, "threads that it counts on have ended: ", name_of(*barrier.waiters.front()),
           " waits for ", barrier.waiters.front()->waits_for);
  }
}

void release(NamedBarrier& barrier) {
  for (Warp* waiter : barrier.waiters) {
    acquire(*waiter, barrier.published);
    waiter->passed = true;
    waiter->barrier_all = barrier.all;
    waiter->barrier_any = barrier.any;
    waiter->barrier_count = barrier.count;
    waiter->unstick();
  }
  barrier = NamedBarrier{};
}

void take_in(NamedBarrier& barrier, Warp& warp, const Instruction& at, uint32_t expected) {
  if (barrier.expected != 0 && barrier.expected != expected)
    fail(Kind::barrier, "threads give it different counts: ", barrier.expected, " and ", expected);
  barrier.expected = expected;
  barrier.arrived += LANES;
  // All that these lanes did is before what any thread does behind the barrier, their own warp's too.
  synchronise(warp, warp.active);
  barrier.published.join(publish(warp, warp.active));
  if (at.numbers[REDUCTION] == none) return;
  const Row row = at.rows[at.row_count - 1];
  const Mask given = (warp.mask(row) ^ (at.numbers[NEGATED] ? ALL : 0)) & warp.active;
  barrier.all = barrier.all && given == warp.active;
  barrier.any = barrier.any || given != 0;
  barrier.count += __builtin_popcount(given);
}

void give_result(Warp& warp, const Instruction& at) {
  if (at.numbers[REDUCTION] == popc) {
    uint32_t* to = warp.row<uint32_t>(at.rows[0]);
    for_lanes(warp.active, [&](uint32_t lane) { to[lane] = warp.barrier_count; });
  } else if (at.numbers[REDUCTION] != none) {
    const bool result = at.numbers[REDUCTION] == all ? warp.barrier_all : warp.barrier_any;
    Mask& to = warp.mask(at.rows[0]);
    to = result ? to | warp.active : to & ~warp.active;
  }
}

// rows: [result], number, [count], [predicate].
Outcome barrier(Warp& warp, const Instruction& at) {
  if (!together(warp, ALL)) return Outcome::waits;
  if (warp.active != warp.live) fail(Kind::barrier, "its guard holds for some lanes of the warp alone");
  if (warp.barrier != NONE) {  // it has arrived before
    if (!warp.passed) return Outcome::waits;
    warp.barrier = NONE;
    warp.passed = false;
    give_result(warp, at);
    return Outcome::next;
  }
  const Row* rows = at.rows + at.results;
  const uint32_t id = uniform(warp, rows[0], "numbers of a barrier");
  if (id >= 16) fail(Kind::barrier, "barrier ", id, " of 16");
  Block& block = *warp.block;
  const uint32_t expected =
      at.numbers[HAS_COUNT] ? uniform(warp, rows[1], "counts of threads") : threads_of(block);
  if (expected == 0 || expected % LANES != 0 || expected > threads_of(block))
    fail(Kind::barrier, "barrier ", id, " for ", expected, " threads, in a block of ", threads_of(block));
  if (warp.live != warp.exists) fail(Kind::barrier, "lanes of the warp have ended");
  NamedBarrier& found = block.barriers[id];
  take_in(found, warp, at, expected);
  const bool waits = at.numbers[DOES] != arrive;
  if (waits) {
    warp.barrier = id;
    warp.waits_for = text_of("barrier ", id, ", at which ", expected, " threads meet");
    found.waiters.push_back(&warp);
  }
  if (found.arrived > found.expected)
    fail(Kind::barrier, "more threads than ", expected, " come to barrier ", id);
  if (found.arrived == found.expected) release(found);
  check_reachable(block);
  if (!waits) return Outcome::next;
  if (!warp.passed) return Outcome::waits;
  warp.barrier = NONE;
  warp.passed = false;
  give_result(warp, at);
  return Outcome::next;
}

bool decode(const Statement& given, Build& build, Instruction& to) {
  if (given.has("warp")) return given.has("sync") && decode_warp_barrier(given, build, to);
  given.has("cta");
  given.has("aligned");
  int64_t does = -1, reduction = none;
  if (given.has("sync")) does = sync;
  if (given.has("arrive")) does = arrive;
  if (given.has("red")) {
    does = reduce;
    reduction = given.has("popc") ? popc : given.has("and") ? all : given.has("or") ? any : none;
    if (reduction == none || !(reduction == popc ? given.has("u32") : given.has("pred"))) return false;
  }
  if (does < 0) return false;
  std::vector<Row> rows;
  size_t next = 0, end = given.operands.size();
  bool negated = false;
  if (does == reduce) {
    if (end < 3) return false;
    rows.push_back(reduction == popc ? build.row(given.operands[0], 4) : build.predicate(given.operands[0]));
    next = 1;
    negated = given.operands[--end].negated;
  }
  if (end - next < 1 || end - next > 2) return false;
  const bool has_count = end - next == 2;
  for (; next < end; ++next) rows.push_back(build.row(given.operands[next], 4));
  if (does == reduce) rows.push_back(build.predicate(given.operands[end]));
  finish(build, to, barrier, does == reduce, std::move(rows), {does, reduction, has_count, 1, negated});
  return true;
}

}  // namespace

void lanes_ended(Warp& warp) { check_reachable(*warp.block); }

void add_barriers(Decoders& decoders) {
  decoders["bar"] = decode;
  decoders["barrier"] = decode;
}

}  // namespace gpu

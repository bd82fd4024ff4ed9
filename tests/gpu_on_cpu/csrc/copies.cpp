// cp.async: copies that each lane makes for itself.
#include "copies.h"

#include <memory>
#include <string>

#include "access.h"
#include "mbarrier.h"

namespace gpu {
namespace {

constexpr uint32_t MOST_BYTES = 16;

Queue& queue_of(Warp& warp) { return warp.queues[static_cast<int>(QueueOf::cp_async)]; }

struct Plan {
  Address to, from;
  uint32_t bytes = 0;
  Row source_bytes = NONE;  // how many are copied; the others become zero
  Row ignored = NONE;       // predicate: none are
  uint64_t has_source = 0;
};

// A lane's copy as it was issued.
struct Copy {
  uint64_t to, from;
  uint32_t lane, copied;
};
struct Copies {
  std::vector<Copy> copies;
  View seen;
};

void perform(Warp& warp, const Plan& plan, uint32_t pc, Clock clock, const Copies& copies) {
  Memory& memory = *warp.block->machine->memory;
  Access by;
  by.warp = &warp;
  by.pc = pc;
  by.strand = warp.block->machine->causality.strand(warp.number, StrandOf::cp_async);
  by.clock = clock;
  by.view = &copies.seen;
  // PTX is silent on it; CUTLASS and Triton have wgmma read such copies without a fence.
  by.fenced = true;
  for (const Copy& copy : copies.copies) {
    std::byte bytes[MOST_BYTES] = {};
    uint8_t written[MOST_BYTES];
    std::fill_n(written, MOST_BYTES, uint8_t{1});
    if (copy.copied != 0) memory.read(by, Space::global, copy.from, copy.copied, copy.lane, bytes, written);
    memory.write(by, Space::shared, copy.to, plan.bytes, copy.lane, bytes, written);
  }
}

Outcome copy(Warp& warp, const Instruction& at) {
  const Plan& plan = *static_cast<const Plan*>(at.more);
  auto copies = std::make_shared<Copies>();
  for_lanes(warp.active, [&](uint32_t lane) {
    uint32_t copied = plan.source_bytes != NONE ? warp.row<uint32_t>(plan.source_bytes)[lane] : plan.bytes;
    if (plan.ignored != NONE && (warp.mask(plan.ignored) >> lane & 1) != 0) copied = 0;
    if (copied > plan.bytes)
      throw Fault{Kind::malformed, text_of(copied, " bytes of ", plan.bytes), static_cast<int>(lane)};
    copies->copies.push_back({aligned_address(warp, plan.to, plan.bytes, lane),
                              aligned_address(warp, plan.from, plan.bytes, lane), lane, copied});
  });
  copies->seen = publish(warp, warp.active);
  const Clock clock = queue_of(warp).open + 1;
  warp.block->machine->issue(warp, QueueOf::cp_async, [&warp, &plan, pc = at.pc, clock, copies] {
    perform(warp, plan, pc, clock, *copies);
  });
  return Outcome::next;
}

Outcome commit(Warp& warp, const Instruction&) {
  ++queue_of(warp).open;
  return Outcome::next;
}

// numbers: how many groups may be left; whether what is in no group yet is one.
Outcome wait(Warp& warp, const Instruction& at) {
  Queue& queue = queue_of(warp);
  const auto left = static_cast<uint32_t>(at.numbers[0]);
  queue.open += static_cast<uint32_t>(at.numbers[1]);
  if (queue.open > left) warp.block->machine->finish(warp, QueueOf::cp_async, queue.open - left);
  return Outcome::next;
}

struct Arrival {
  Address address;
  bool counted;  // .noinc: the barrier's count has it already
};

// The barrier hears of it when all copies so far are done; the warp has waited for none of them then.
Outcome arrive_later(Warp& warp, const Instruction& at) {
  const Arrival& arrival = *static_cast<const Arrival*>(at.more);
  Block& block = *warp.block;
  const uint32_t group = queue_of(warp).open + 1;
  for_lanes(warp.active, [&](uint32_t lane) {
    const auto address = static_cast<uint32_t>(aligned_address(warp, arrival.address, 8, lane));
    if (!arrival.counted) expect_more(block, address, 1);
    block.machine->issue(warp, [&warp, &block, address, group, lane] {
      Queue& queue = queue_of(warp);
      const uint32_t finished = queue.finished;
      block.machine->finish(warp, QueueOf::cp_async, group);
      queue.finished = finished;
      View seen;
      seen.see(block.machine->causality.strand(warp.number, StrandOf::cp_async),
               {0, Mask(1) << lane, group + 1});
      arrive(block, address, 1, seen);
    });
  });
  return Outcome::next;
}

bool decode_copy(const Statement& given, Build& build, Instruction& to) {
  auto plan = std::make_shared<Plan>();
  const bool all_levels = given.has("ca"), second_level = given.has("cg");
  const bool shared = given.has("shared") || given.has("shared::cta");
  for (const char* hint : {"L2::64B", "L2::128B", "L2::256B"}) given.has(hint);
  const size_t most = given.has("L2::cache_hint") ? 5 : 4, count = given.operands.size();
  if (!shared || !given.has("global") || all_levels == second_level || count < most - 2 || count > most)
    return false;
  if (given.operands[2].is != Operand::Is::number) return false;
  plan->to = address_of(given.operands[0], build);
  plan->from = address_of(given.operands[1], build);
  plan->bytes = static_cast<uint32_t>(given.operands[2].bits);
  if (plan->bytes != 16 && (second_level || (plan->bytes != 4 && plan->bytes != 8))) return false;
  std::vector<Row> rows = {plan->to.row, plan->from.row};
  if (count == most) {
    const Operand& operand = given.operands[3];
    const bool ignores = operand.is == Operand::Is::reg && build.width_of(operand) == 0;
    (ignores ? plan->ignored : plan->source_bytes) =
        ignores ? build.predicate(operand) : build.row(operand, 4);
    rows.push_back(ignores ? plan->ignored : plan->source_bytes);
  }
  finish(build, to, copy, 0, std::move(rows), {});
  to.more = build.keep(plan);
  return true;
}

bool decode_arrival(const Statement& given, Build& build, Instruction& to) {
  auto arrival = std::make_shared<Arrival>();
  const bool shared = given.has("shared") || given.has("shared::cta");
  if (!given.has("arrive") || !given.has("b64") || !shared || given.operands.size() != 1) return false;
  arrival->counted = given.has("noinc");
  arrival->address = address_of(given.operands[0], build);
  finish(build, to, arrive_later, 0, {arrival->address.row}, {});
  to.more = build.keep(arrival);
  return true;
}

bool decode_cp(const Statement& given, Build& build, Instruction& to) {
  if (!given.has("async")) return false;
  if (given.has("bulk")) return decode_bulk(given, build, to);
  if (given.has("mbarrier")) return decode_arrival(given, build, to);
  if (given.has("commit_group")) {
    finish(build, to, commit, 0, {}, {});
    return given.operands.empty();
  }
  if (given.has("wait_all")) {
    finish(build, to, wait, 0, {}, {0, 1});
    return given.operands.empty();
  }
  if (given.has("wait_group")) return decode_wait_group(given, build, to, wait) && !to.numbers[1];
  return decode_copy(given, build, to);
}

}  // namespace

bool decode_wait_group(const Statement& given, Build& build, Instruction& to, Step step) {
  if (given.operands.size() != 1 || given.operands[0].is != Operand::Is::number) return false;
  finish(build, to, step, 0, {}, {static_cast<int64_t>(given.operands[0].bits), given.has("read")});
  return true;
}

void add_copies(Decoders& decoders) { decoders["cp"] = decode_cp; }

}  // namespace gpu

#include "wgmma.h"

#include <algorithm>

#include "control.h"
#include "descriptor.h"
#include "fragments.h"

namespace gpu {
namespace {

constexpr uint32_t WARPS = 4;  // of a warpgroup
constexpr uint32_t ROWS = 16;  // of D that each of them has
constexpr uint32_t A_REGISTERS = 4;
constexpr uint32_t MOST_COLUMNS = 256, MOST_DEPTH = 32;

Queue& queue_of(Warp& warp) { return warp.queues[static_cast<int>(QueueOf::wgmma)]; }
Clock clock_of(uint32_t group) { return group + 1; }

// One warp's part of an mma_async, from when it is issued to when it is performed.
struct Operation {
  Warp* warp;
  const Instruction* at;
  std::shared_ptr<const View> view;
  Clock clock;
  Tile a, b;
  bool adds;
};

// Elements [first, first + count) of M or N by all of K; those along K follow one another with `k_inner`,
// otherwise those along M or N.
void load_tile(const Access& by, const Tile& tile, Element element, const Product& p, uint32_t first,
               uint32_t count, bool k_inner, float* to) {
  std::byte bytes[MOST_COLUMNS * 32];
  read_tile(by, tile, first, count, bytes);
  if (tile.k_major == k_inner) {
    widen(element, bytes, count * p.k, to);
    return;
  }
  float values[MOST_COLUMNS * MOST_DEPTH];
  widen(element, bytes, count * p.k, values);
  const uint32_t outer = tile.k_major ? count : p.k, inner = tile.k_major ? p.k : count;
  for (uint32_t i = 0; i < outer; ++i)
    for (uint32_t j = 0; j < inner; ++j) to[j * outer + i] = values[i * inner + j];
}

void perform(const Operation& operation) {
  Warp& warp = *operation.warp;
  const Instruction& at = *operation.at;
  const Wgmma& plan = *wgmma_of(at);
  const Product& p = plan.product;
  Access by = access_of(warp, at);
  by.strand = warp.block->machine->causality.strand(warp.number, StrandOf::wgmma);
  by.clock = operation.clock;
  by.view = operation.view.get();
  by.async_proxy = true;
  float a[ROWS * MOST_DEPTH], b[MOST_DEPTH * MOST_COLUMNS], sums[ROWS * MOST_COLUMNS];
  if (plan.a_shared) {
    load_tile(by, operation.a, p.a, p, warp.index % WARPS * ROWS, ROWS, true, a);
  } else {
    load_operand(warp, at.rows + at.results, p.a, p.k, 2, p.k, 1, a);
  }
  load_tile(by, operation.b, p.b, p, 0, p.n, false, b);
  if (plan.negated) std::transform(a, a + ROWS * p.k, a, std::negate<float>());
  if (operation.adds) {
    load_sums(warp, at.rows, p, sums);
  } else {
    std::fill_n(sums, ROWS * p.n, 0.0f);
  }
  multiply(p, a, b, sums);
  store_sums(warp, at.rows, operation.adds ? at.rows : nullptr, p, sums);
}

void check_warpgroup(const Warp& warp) {
  const std::vector<Warp>& warps = warp.block->warps;
  const size_t first = warp.index / WARPS * WARPS;
  for (size_t i = first; i < first + WARPS; ++i)
    if (i >= warps.size() || warps[i].exists != ALL)
      fail(Kind::barrier, "needs a warpgroup of 128 threads, and the block has fewer");
}

uint64_t common_descriptor(const Warp& warp, Row row) {
  const uint64_t* values = warp.row<uint64_t>(row);
  for (uint32_t lane = 1; lane < LANES; ++lane)
    if (values[lane] != values[0])
      throw Fault{Kind::malformed, "lanes have different descriptors", int(lane)};
  return values[0];
}

bool adds(const Warp& warp, const Wgmma& plan, Row scale) {
  const Mask given = warp.mask(scale) ^ (plan.unless ? ALL : 0);
  if (given != 0 && given != ALL) fail(Kind::malformed, "scale-d is not the same in all lanes");
  return given != 0;
}

Outcome mma_async(Warp& warp, const Instruction& at) {
  if (!whole_warp(warp)) return Outcome::waits;
  check_warpgroup(warp);
  const Wgmma& plan = *wgmma_of(at);
  Machine& machine = *warp.block->machine;
  check_issue(warp, at, plan);
  Operation operation{
      &warp, &at, std::make_shared<View>(publish(warp, ALL)), clock_of(queue_of(warp).open), {}, {}, false};
  const uint64_t bytes = warp.block->shared.size();
  uint32_t row = at.results;
  if (plan.a_shared)
    operation.a = read_descriptor(common_descriptor(warp, at.rows[row]), plan.a_k_major, WARPS * ROWS, bytes);
  row += plan.a_shared ? 1 : A_REGISTERS;
  operation.b = read_descriptor(common_descriptor(warp, at.rows[row]), plan.b_k_major, plan.product.n, bytes);
  operation.adds = adds(warp, plan, at.rows[row + 1]);
  note_in_flight(warp, at, plan);
  machine.issue(warp, QueueOf::wgmma, [operation] { perform(operation); });
  return Outcome::next;
}

Outcome fence(Warp& warp, const Instruction&) {
  if (!whole_warp(warp)) return Outcome::waits;
  ++warp.fences;
  return Outcome::next;
}

Outcome commit_group(Warp& warp, const Instruction&) {
  if (!whole_warp(warp)) return Outcome::waits;
  ++queue_of(warp).open;
  return Outcome::next;
}

// numbers: groups that may be left.
Outcome wait_group(Warp& warp, const Instruction& at) {
  if (!whole_warp(warp)) return Outcome::waits;
  Machine& machine = *warp.block->machine;
  const uint32_t open = queue_of(warp).open;
  const uint32_t finished = open - static_cast<uint32_t>(std::min<int64_t>(at.numbers[0], open));
  machine.finish(warp, QueueOf::wgmma, finished);
  std::erase_if(warp.in_flight, [&](const RowsInFlight& rows) { return rows.group < finished; });
  const Strand strand = machine.causality.strand(warp.number, StrandOf::wgmma);
  warp.view.see_for_async(strand, {clock_of(finished), 0, 0});
  return Outcome::next;
}

std::vector<std::pair<Row, Row>> ranges_of(std::vector<Row> rows) {
  constexpr uint32_t BYTES = 4 * LANES;
  std::vector<std::pair<Row, Row>> ranges;
  std::sort(rows.begin(), rows.end());
  for (const Row row : rows) {
    if (ranges.empty() || ranges.back().second != row) ranges.emplace_back(row, row);
    ranges.back().second = row + BYTES;
  }
  return ranges;
}

bool has_shape(const Product& p) {
  if (p.m != WARPS * ROWS || p.k * bytes_of(p.a) != 32 || p.n % 8 != 0 || p.n > MOST_COLUMNS) return false;
  return !is_integer(p.a) || p.n % 16 == 0 || p.n == 8 || p.n == 24;
}

// wgmma.mma_async.sync.aligned.<shape>[.satfinite].<D>.<A>.<B>
bool read_product(const Statement& given, Product* to) {
  const std::vector<std::string>& parts = given.parts;
  to->saturates = given.has("satfinite");
  const size_t types = to->saturates ? 6 : 5;
  if (parts.size() != types + 3 || (to->saturates && parts[5] != "satfinite")) return false;
  if (!given.has("sync") || !given.has("aligned") || !read_shape(parts[4], to)) return false;
  if (!read_types(parts[types], parts[types + 1], parts[types + 2], to) || !has_shape(*to)) return false;
  if (to->saturates && to->sum != Sum::s32) return false;
  to->m = ROWS;
  for (const std::string& part : parts) given.has(part);
  return true;
}

bool read_rows(const Statement& given, Build& build, Wgmma* plan, std::vector<Row>* rows) {
  const std::vector<Operand>& operands = given.operands;
  const Operand &d = operands[0], &a = operands[1], &scale = operands[3];
  if (d.is != Operand::Is::vector || d.parts.size() != accumulator_rows(plan->product)) return false;
  for (const Operand& part : d.parts) rows->push_back(build.row(part, 4));
  plan->accumulators = ranges_of(*rows);
  plan->a_shared = a.is != Operand::Is::vector;
  if (plan->a_shared) {
    rows->push_back(build.row(a, 8));
  } else {
    if (a.parts.size() != A_REGISTERS) return false;
    for (const Operand& part : a.parts) rows->push_back(build.row(part, 4));
    plan->a = ranges_of({rows->end() - A_REGISTERS, rows->end()});
  }
  rows->push_back(build.row(operands[2], 8));
  rows->push_back(build.predicate(scale));
  plan->unless = scale.negated;
  return true;
}

// What follows scale-d: imm-scale-a and imm-scale-b unless these are integers, imm-trans-a (of a descriptor)
// and imm-trans-b for elements of 16 bits.
bool read_immediates(const Statement& given, Wgmma* plan) {
  const Product& p = plan->product;
  const bool transposes = bytes_of(p.a) == 2;
  const size_t scales = is_integer(p.a) ? 0 : 2;
  const size_t wanted = 4 + scales + (transposes ? (plan->a_shared ? 2 : 1) : 0);
  if (given.operands.size() != wanted) return false;
  for (size_t i = 4; i < wanted; ++i) {
    if (given.operands[i].is != Operand::Is::number) return false;
    const int64_t value = static_cast<int64_t>(given.operands[i].bits);
    if (i < 4 + scales ? value != 1 && value != -1 : value != 0 && value != 1) return false;
  }
  plan->negated = scales != 0 && given.operands[4].bits != given.operands[5].bits;
  if (transposes) {
    plan->b_k_major = given.operands.back().bits == 0;
    if (plan->a_shared) plan->a_k_major = given.operands[wanted - 2].bits == 0;
  }
  return true;
}

bool decode_mma_async(const Statement& given, Build& build, Instruction& to) {
  auto plan = std::make_shared<Wgmma>();
  std::vector<Row> rows;
  if (given.operands.size() < 4 || !read_product(given, &plan->product)) return false;
  if (!read_rows(given, build, plan.get(), &rows) || !read_immediates(given, plan.get())) return false;
  finish(build, to, mma_async, accumulator_rows(plan->product), std::move(rows), {});
  to.more = build.keep(std::static_pointer_cast<void>(plan));
  return true;
}

bool decode_wgmma(const Statement& given, Build& build, Instruction& to) {
  if (build.target() != "sm_90a" || !given.has("sync") || !given.has("aligned")) return false;
  if (given.has("mma_async")) return decode_mma_async(given, build, to);
  const bool waits = given.has("wait_group");
  const Step step = waits                       ? wait_group
                    : given.has("fence")        ? fence
                    : given.has("commit_group") ? commit_group
                                                : nullptr;
  if (step == nullptr || given.operands.size() != (waits ? 1 : 0)) return false;
  if (waits && given.operands[0].is != Operand::Is::number) return false;
  finish(build, to, step, 0, {}, {waits ? static_cast<int64_t>(given.operands[0].bits) : 0});
  return true;
}

}  // namespace

const Wgmma* wgmma_of(const Instruction& at) {
  return at.step == mma_async ? static_cast<const Wgmma*>(at.more) : nullptr;
}

void add_wgmma(Decoders& decoders) { decoders["wgmma"] = decode_wgmma; }

}  // namespace gpu

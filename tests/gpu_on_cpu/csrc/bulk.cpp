// cp.async.bulk: copies of lines of memory and of tiles of tensors, by the async proxy.
#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "access.h"
#include "copies.h"
#include "mbarrier.h"
#include "tensor_map.h"

namespace gpu {
namespace {

constexpr uint32_t NO_LANE = NONE & 0xff;
constexpr uint32_t LINE = 16, TILE_ALIGN = 128, MOST_ROW = 2048;

struct Plan {
  bool loads = false;  // into shared memory, with an mbarrier; otherwise a store, in a group
  bool tensor = false;
  uint32_t rank = 0;
  Space from = Space::global;  // of a load
  Address shared, other;       // the other: global memory, or a tensor map
  Address barrier;
  Row bytes = NONE;
  Row coordinates[TENSOR_AXES] = {};
};

// A copy as it was issued.
struct Copy {
  uint64_t shared = 0, other = 0;
  uint32_t barrier = 0, bytes = 0;
  int32_t at[TENSOR_AXES] = {};
  TensorMap map{};
  View seen;
};

// A run of bytes, on its way.
struct Run {
  std::byte bytes[MOST_ROW];
  uint8_t written[MOST_ROW];
};

// Chunks of 16 bytes change places within a line of the pattern, by the number of 128 bytes that it lies in.
template <class T>
void swizzle(T* line, uint32_t bytes, uint64_t address, uint32_t pattern) {
  if (pattern == 0) return;
  T swizzled[MOST_ROW];
  const uint64_t moved = address / 128 % (1u << pattern);
  for (uint64_t chunk = 0; chunk < bytes / LINE; ++chunk)
    std::memcpy(swizzled + (chunk ^ moved) * LINE, line + chunk * LINE, LINE * sizeof(T));
  std::memcpy(line, swizzled, bytes * sizeof(T));
}

// Accesses of the two sides of a copy.
struct Sides {
  Access reads, writes;
};

void copy_line(Memory& memory, const Sides& by, const Plan& plan, const Copy& copy) {
  Run run;
  const Space from = plan.loads ? plan.from : Space::shared, to = plan.loads ? Space::shared : Space::global;
  for (uint32_t done = 0; done < copy.bytes;) {
    const uint32_t now = std::min(copy.bytes - done, MOST_ROW);
    memory.read(by.reads, from, (plan.loads ? copy.other : copy.shared) + done, now, NO_LANE, run.bytes,
                run.written);
    memory.write(by.writes, to, (plan.loads ? copy.shared : copy.other) + done, now, NO_LANE, run.bytes,
                 run.written);
    done += now;
  }
}

// One row of a tile, along the innermost axis; `global` is the address of its first element, where the tensor
// has one.
void copy_row(Memory& memory, const Sides& by, bool loads, const Copy& copy, uint64_t shared, uint64_t global,
              bool inside) {
  const TensorMap& map = copy.map;
  const uint32_t size = map.element_bytes, bytes = map.box[0] * size;
  const int64_t first = std::clamp<int64_t>(-int64_t(copy.at[0]), 0, map.box[0]);
  const int64_t end = std::clamp<int64_t>(int64_t(map.sizes[0]) - copy.at[0], first, map.box[0]);
  const auto skipped = static_cast<uint32_t>(first * size);
  const uint32_t taken = inside ? static_cast<uint32_t>((end - first) * size) : 0;
  Run run;
  if (loads) {
    std::memset(run.bytes, map.fill_nan ? 0xff : 0, bytes);
    std::memset(run.written, 1, bytes);
    if (taken != 0)
      memory.read(by.reads, Space::global, global + skipped, taken, NO_LANE, run.bytes + skipped,
                  run.written + skipped);
    swizzle(run.bytes, bytes, shared, map.swizzle);
    swizzle(run.written, bytes, shared, map.swizzle);
    memory.write(by.writes, Space::shared, shared, bytes, NO_LANE, run.bytes, run.written);
    by.writes.warp->block->provenance.copied(shared, bytes, LINE << map.swizzle);
  } else {
    memory.read(by.reads, Space::shared, shared, bytes, NO_LANE, run.bytes, run.written);
    swizzle(run.bytes, bytes, shared, map.swizzle);
    swizzle(run.written, bytes, shared, map.swizzle);
    if (taken != 0)
      memory.write(by.writes, Space::global, global + skipped, taken, NO_LANE, run.bytes + skipped,
                   run.written + skipped);
  }
}

uint32_t tile_bytes(const TensorMap& map) {
  uint32_t bytes = map.element_bytes;
  for (uint32_t axis = 0; axis < map.rank; ++axis) bytes *= map.box[axis];
  return bytes;
}

void copy_tile(Memory& memory, const Sides& by, const Plan& plan, const Copy& copy) {
  const TensorMap& map = copy.map;
  const uint32_t bytes = map.box[0] * map.element_bytes, rows = tile_bytes(map) / bytes;
  for (uint32_t row = 0; row < rows; ++row) {
    bool inside = true;
    uint64_t global = map.address + int64_t(copy.at[0]) * map.element_bytes;
    for (uint32_t axis = 1, rest = row; axis < map.rank; rest /= map.box[axis++]) {
      const int64_t at = int64_t(copy.at[axis]) + rest % map.box[axis];
      inside = inside && at >= 0 && at < int64_t(map.sizes[axis]);
      global += at * map.strides[axis - 1];
    }
    copy_row(memory, by, plan.loads, copy, copy.shared + row * bytes, global, inside);
  }
}

void perform(const Sides& by, const Plan& plan, const Copy& copy) {
  Memory& memory = *by.reads.warp->block->machine->memory;
  plan.tensor ? copy_tile(memory, by, plan, copy) : copy_line(memory, by, plan, copy);
}

Access access_of_copy(Warp& warp, uint32_t pc, const Copy& copy, Strand strand, Clock clock) {
  Access by;
  by.warp = &warp;
  by.pc = pc;
  by.strand = strand;
  by.clock = clock;
  by.view = &copy.seen;
  by.async_proxy = true;
  return by;
}

void issue_load(Warp& warp, const Plan& plan, uint32_t pc, std::shared_ptr<const Copy> copy) {
  warp.block->machine->issue(warp, [&warp, &plan, pc, copy] {
    Block& block = *warp.block;
    Causality& causality = block.machine->causality;
    const Strand strand = causality.of_mbarrier(block.number, copy->barrier);
    const Access by = access_of_copy(warp, pc, *copy, strand, causality.now(strand));
    perform({by, by}, plan, *copy);
    causality.advance(strand);
    View seen;
    seen.see_for_async(strand, {by.clock + 1});
    complete_tx(block, copy->barrier, copy->bytes, seen);
  });
}

void issue_store(Warp& warp, const Plan& plan, uint32_t pc, std::shared_ptr<const Copy> copy) {
  const Causality& causality = warp.block->machine->causality;
  const Clock clock = warp.queues[static_cast<int>(QueueOf::bulk)].open + 1;
  const Strand reads = causality.strand(warp.number, StrandOf::bulk_reads);
  const Strand writes = causality.strand(warp.number, StrandOf::bulk_writes);
  warp.block->machine->issue(warp, QueueOf::bulk, [&warp, &plan, pc, clock, reads, writes, copy] {
    perform({access_of_copy(warp, pc, *copy, reads, clock), access_of_copy(warp, pc, *copy, writes, clock)},
            plan, *copy);
  });
}

void check_map(const TensorMap& map, uint32_t rank) {
  if (map.magic != TensorMap::MAGIC) fail(Kind::malformed, "there is no tensor map at the address");
  if (map.rank != rank)
    fail(Kind::malformed, "a tensor map of ", map.rank, " axes, where ", rank, " are given");
  const uint32_t row = map.box[0] * map.element_bytes;
  if (row % LINE != 0 || row > MOST_ROW) fail(Kind::malformed, "rows of ", row, " bytes in a tile");
  if (map.swizzle != 0 && row > LINE << map.swizzle)
    fail(Kind::malformed, "rows of ", row, " bytes in a tile with a swizzle of ", LINE << map.swizzle);
  if (map.swizzle != 0 && row != LINE << map.swizzle)
    fail(Kind::unknown, "rows that are shorter than their swizzle are not modelled");
}

Outcome issue(Warp& warp, const Instruction& at) {
  const Plan& plan = *static_cast<const Plan*>(at.more);
  Memory& memory = *warp.block->machine->memory;
  for_lanes(warp.active, [&](uint32_t lane) {
    auto copy = std::make_shared<Copy>();
    copy->shared = aligned_address(warp, plan.shared, plan.tensor ? TILE_ALIGN : LINE, lane);
    copy->shared = Memory::resolve(Space::generic, copy->shared).second;
    copy->other = aligned_address(warp, plan.other, plan.tensor ? 64 : LINE, lane);
    if (plan.tensor) {
      memory.read(access_of(warp, at), Space::generic, copy->other, sizeof(TensorMap), lane, &copy->map);
      check_map(copy->map, plan.rank);
      copy->bytes = tile_bytes(copy->map);
      for (uint32_t axis = 0; axis < plan.rank; ++axis)
        copy->at[axis] = warp.row<int32_t>(plan.coordinates[axis])[lane];
    } else {
      copy->bytes = warp.row<uint32_t>(plan.bytes)[lane];
      if (copy->bytes % LINE != 0)
        throw Fault{Kind::misaligned, text_of("a copy of ", copy->bytes, " bytes"), static_cast<int>(lane)};
    }
    copy->seen = publish(warp, Mask(1) << lane);
    if (!plan.loads) return issue_store(warp, plan, at.pc, copy);
    const uint64_t barrier = aligned_address(warp, plan.barrier, 8, lane);
    copy->barrier = static_cast<uint32_t>(Memory::resolve(Space::generic, barrier).second);
    issue_load(warp, plan, at.pc, copy);
  });
  return Outcome::next;
}

Outcome commit(Warp& warp, const Instruction&) {
  ++warp.queues[static_cast<int>(QueueOf::bulk)].open;
  return Outcome::next;
}

// numbers: how many groups may be left; whether only their reads are waited for.
Outcome wait(Warp& warp, const Instruction& at) {
  const Causality& causality = warp.block->machine->causality;
  const uint32_t open = warp.queues[static_cast<int>(QueueOf::bulk)].open;
  const auto left = static_cast<uint32_t>(at.numbers[0]);
  if (open <= left) return Outcome::next;
  warp.block->machine->finish(warp, QueueOf::bulk, open - left);
  View seen;
  seen.see_for_async(causality.strand(warp.number, StrandOf::bulk_reads), {open - left + 1});
  if (!at.numbers[1])
    seen.see_for_async(causality.strand(warp.number, StrandOf::bulk_writes), {open - left + 1});
  acquire(warp, seen);
  return Outcome::next;
}

Outcome nothing(Warp&, const Instruction&) { return Outcome::next; }

uint32_t rank_of(const Statement& given) {
  for (uint32_t rank = 1; rank <= TENSOR_AXES; ++rank)
    if (given.has(text_of(rank, 'd'))) return rank;
  return 0;
}

// A map and coordinates, [map, {x, y}].
bool read_tensor(const Statement& given, const Operand& operand, Build& build, Plan& plan,
                 std::vector<Row>& rows) {
  plan.rank = rank_of(given);
  given.has("tile");
  plan.other = address_of(operand, build);
  if (plan.rank == 0 || operand.parts.size() != plan.rank) return false;
  for (uint32_t axis = 0; axis < plan.rank; ++axis)
    rows.push_back(plan.coordinates[axis] = build.row(operand.parts[axis], 4));
  return true;
}

// What the parts say about where from and where to.
bool read_direction(const Statement& given, Plan& plan) {
  const std::vector<std::string>& parts = given.parts;
  const auto place = [&](std::string_view part) {
    return given.has(part) ? std::find(parts.begin(), parts.end(), part) - parts.begin() : -1;
  };
  const auto global = place("global"), cluster = place("shared::cluster"), block = place("shared::cta");
  plan.loads = given.has("mbarrier::complete_tx::bytes");
  if (plan.loads == given.has("bulk_group")) return false;
  const auto shared = std::max(cluster, block);
  if (plan.loads && cluster >= 0 && block > cluster && global < 0) {
    plan.from = Space::shared;
    return true;
  }
  return global >= 0 && shared >= 0 && (cluster < 0 || block < 0) && plan.loads == (shared < global);
}

bool decode_prefetch(const Statement& given, Build& build, Instruction& to) {
  Plan plan;
  std::vector<Row> rows;
  const bool tensor = given.has("tensor");
  if (!given.has("L2") || !given.has("global") || given.operands.empty()) return false;
  if (tensor && !read_tensor(given, given.operands[0], build, plan, rows)) return false;
  rows.push_back(address_of(given.operands[0], build).row);
  given.has("L2::cache_hint");
  finish(build, to, nothing, 0, std::move(rows), {});
  return true;
}

}  // namespace

bool decode_bulk(const Statement& given, Build& build, Instruction& to) {
  if (given.has("prefetch")) return decode_prefetch(given, build, to);
  if (given.has("wait_group")) return decode_wait_group(given, build, to, wait);
  if (given.has("commit_group")) {
    finish(build, to, commit, 0, {}, {});
    return given.operands.empty();
  }
  auto plan = std::make_shared<Plan>();
  plan->tensor = given.has("tensor");
  const size_t policy = given.has("L2::cache_hint");
  if (!read_direction(given, *plan)) return false;
  const size_t count = 2 + !plan->tensor + plan->loads;
  if (given.operands.size() != count + policy) return false;
  const Operand &target = given.operands[0], &source = given.operands[1];
  std::vector<Row> rows;
  plan->shared = address_of(plan->loads ? target : source, build);
  const Operand& other = plan->loads ? source : target;
  if (plan->tensor) {
    if (!read_tensor(given, other, build, *plan, rows)) return false;
  } else {
    plan->other = address_of(other, build);
    rows.push_back(plan->bytes = build.row(given.operands[2], 4));
  }
  rows.insert(rows.end(), {plan->shared.row, plan->other.row});
  if (plan->loads) {
    plan->barrier = address_of(given.operands[count - 1], build);
    rows.push_back(plan->barrier.row);
  }
  finish(build, to, issue, 0, std::move(rows), {});
  to.more = build.keep(plan);
  return true;
}

}  // namespace gpu

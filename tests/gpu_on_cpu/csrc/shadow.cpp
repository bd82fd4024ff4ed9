#include "shadow.h"

#include <bit>
#include <cstring>
#include <set>
#include <tuple>

#include "memory.h"

namespace gpu {
namespace {

uint32_t mixed(uint64_t key) { return static_cast<uint32_t>(key * 0x9e3779b97f4a7c15ull >> 40); }

template <class T>
uint32_t added(std::vector<T>& to, const T& item, uint32_t bits) {
  if (to.size() >> bits != 0) fail(Kind::limits, "more accesses than the executor's records of them hold");
  to.push_back(item);
  return static_cast<uint32_t>(to.size() - 1);
}

// End of the run of cells that are equal to the one at `first`.
uint32_t run_end(const Cell* cells, uint32_t first, uint32_t count) {
  uint32_t end = first + 1;
  while (end < count && cells[end] == cells[first]) ++end;
  return end;
}

}  // namespace

Shadow::Shadow() : records_(1), recent_(RECENT), nodes_(1), steps_(STEPS) {}

void Shadow::begin(const Access& by, uint32_t lane) {
  by_ = &by;
  lane_ = lane < LANES ? lane : 0;
  const uint32_t flags =
      (by.atomic ? Record::ATOMIC : 0) | (within_block(by.scope) ? Record::BLOCK_SCOPE : 0) |
      (by.async_proxy || by.fenced ? Record::ASYNC : 0) | (by.read_only ? Record::READ_ONLY : 0) |
      (by.atomic ? std::countr_zero(by.element) << Record::SIZE_AT : 0);
  const Record record{by.strand, by.clock, by.warp->number, by.pc, flags};
  if (record == made_ && index_ != 0) return;
  made_ = record;
  is_warp_ = Causality::is_warp(by.strand);
  good_write_ = good_reads_ = 0;
  uint32_t& recent = recent_[mixed((uint64_t(by.strand) << 32 | by.clock) ^ uint64_t(by.pc) << 20) % RECENT];
  if (recent == 0 || records_[recent] != record) recent = added(records_, record, 32 - LANE_BITS);
  index_ = recent;
}

bool Shadow::ordered_all(const Record& other, bool wrote) const {
  const bool needs_fence = by_->async_proxy && wrote && (other.flags & Record::ASYNC) == 0;
  return by_->view->covers_all(other.strand, other.clock, needs_fence);
}

bool Shadow::ordered(const Record& other, uint32_t lane, bool wrote) const {
  const bool same_lane = lane == lane_ || lane == SOME;
  if (is_warp_ && other.strand == by_->strand && same_lane) return true;
  const auto covers = [&](const View& view) {
    const bool needs_fence = by_->async_proxy && wrote && (other.flags & Record::ASYNC) == 0;
    return needs_fence ? view.covers_for_async(other.strand, other.clock, lane)
                       : view.covers(other.strand, other.clock, lane);
  };
  if (covers(*by_->view)) return true;
  for (const View::Aside& aside : by_->view->asides())
    if ((aside.lanes >> lane_ & 1) != 0 && covers(aside.view)) return true;
  if (!is_warp_ || !same_lane) return false;
  // A lane's own copies, once it has waited for them.
  const Warp& warp = *by_->warp;
  return other.strand == warp.block->machine->causality.strand(warp.number, StrandOf::cp_async) &&
         other.clock <= warp.queues[static_cast<int>(QueueOf::cp_async)].finished;
}

bool Shadow::both_atomic(const Record& other) const {
  if ((made_.flags & other.flags & Record::ATOMIC) == 0) return false;
  if (((made_.flags ^ other.flags) & Record::SIZE) != 0) return false;
  if (((made_.flags | other.flags) & Record::BLOCK_SCOPE) == 0) return true;
  const uint32_t warps = by_->warp->block->machine->causality.warps_a_block();
  return other.warp / warps == made_.warp / warps;
}

// Whoever calls it has found out that nothing orders the two.
bool Shadow::refuse(const Record& other, uint32_t lane, bool wrote) {
  const bool fence = by_->async_proxy && wrote && by_->view->covers(other.strand, other.clock, lane);
  conflict_ = {true, fence ? Kind::proxy : Kind::race, wrote, 0, other};
  return false;
}

bool Shadow::after_write(uint32_t write) {
  const uint32_t record = write >> LANE_BITS;
  if (record == good_write_ || record == 0) return true;
  const Record& other = records_[record];
  if (both_atomic(other)) return true;
  if ((made_.flags & Record::READ_ONLY) != 0) return refuse(other, write % LANES, true);
  if (ordered_all(other, true)) {
    good_write_ = record;
    return true;
  }
  return ordered(other, write % LANES, true) || refuse(other, write % LANES, true);
}

bool Shadow::after_reads(uint32_t reads, bool only_writes) {
  const uint32_t set = reads >> READER_BITS;
  if (set == good_reads_) return true;
  bool good = !only_writes;
  uint32_t lane = reads % (1 << READER_BITS);
  for (uint32_t at = set; at != 0; at = nodes_[at].before) {
    const Node& node = nodes_[at];
    const Record& other = records_[node.record];
    if (at != set) lane = node.several ? SEVERAL : SOME;
    if ((only_writes && !node.wrote) || both_atomic(other)) continue;
    if (!only_writes && (other.flags & Record::READ_ONLY) != 0) return refuse(other, lane, false);
    if (ordered_all(other, node.wrote)) continue;
    good = false;
    if (!ordered(other, lane, node.wrote)) return refuse(other, lane, node.wrote);
  }
  if (good) good_reads_ = set;
  return true;
}

Shadow::Step& Shadow::step_of(uint32_t set, uint32_t extra) {
  return steps_[mixed((uint64_t(set) << 32 | index_) ^ uint64_t(extra) << 27) % STEPS];
}

uint32_t Shadow::push(uint32_t before, uint32_t record, bool several, bool wrote) {
  const Node& last = nodes_[before];
  Node node{before, record, last.size + 1, last.limit, several, wrote, wrote || last.any_wrote};
  const uint32_t set = added(nodes_, node, 32 - READER_BITS);
  return node.size > node.limit ? compact(set) : set;
}

// The same set with one access of each strand, the last one.
uint32_t Shadow::compact(uint32_t set) {
  std::vector<Node> kept;
  std::set<std::tuple<Strand, uint32_t, bool>> known;
  for (uint32_t at = set; at != 0; at = nodes_[at].before) {
    const Record& record = records_[nodes_[at].record];
    const bool wrote = nodes_[at].wrote;
    if (known.emplace(record.strand, uint32_t{record.flags}, wrote).second) kept.push_back(nodes_[at]);
  }
  uint32_t to = 0;
  for (auto node = kept.rbegin(); node != kept.rend(); ++node) {
    node->before = to;
    node->size = nodes_[to].size + 1;
    node->limit = static_cast<uint32_t>(2 * kept.size() + 128);
    node->any_wrote = node->wrote || nodes_[to].any_wrote;
    to = added(nodes_, *node, 32 - READER_BITS);
  }
  return to;
}

// Whether nobody needs to know of it after the access that is made.
bool Shadow::droppable(const Node& node, bool by_change) const {
  const Record& other = records_[node.record];
  // These are stricter than being ordered after the new access.
  if ((other.flags & ~made_.flags & Record::READ_ONLY) != 0) return false;
  if (ordered_all(other, node.wrote)) return true;
  const bool weaker = (made_.flags & ~other.flags & Record::ATOMIC) != 0 && !by_change;
  return other.strand == made_.strand && !weaker && (by_change || !node.wrote);
}

// The set whose last read was by that lane, as the rest of another one.
uint32_t Shadow::keep_several(uint32_t set, uint32_t lane) {
  if (set == 0 || lane != SEVERAL || nodes_[set].several) return set;
  const Node node = nodes_[set];
  return push(node.before, node.record, true, node.wrote);
}

uint32_t Shadow::with_read(uint32_t reads) {
  const uint32_t set = reads >> READER_BITS, last = reads % (1 << READER_BITS);
  if (set != 0 && nodes_[set].record == index_) return last == lane_ ? reads : set << READER_BITS | SEVERAL;
  const uint32_t lanes = set == 0 ? 0 : last == SEVERAL ? 2 : last == lane_ ? 0 : 1;
  Step& step = step_of(set, lanes);
  if (step.record != index_ || step.set != set || step.extra != lanes) {
    bool several = false;
    uint32_t rest = set, lane = last;
    while (rest != 0 && droppable(nodes_[rest], false)) {
      const Record& other = records_[nodes_[rest].record];
      several = several || (other.strand == made_.strand && lane != lane_ && lane != SOME &&
                            !by_->view->covers_all(other.strand, other.clock, false));
      rest = nodes_[rest].before;
      lane = nodes_[rest].several ? SEVERAL : SOME;
    }
    if (rest == set) rest = keep_several(rest, last);
    step = {set, index_, lanes, push(rest, index_, false, false), several};
  }
  return step.to << READER_BITS | (step.several ? SEVERAL : lane_);
}

uint32_t Shadow::with_change(Cell cell) {
  const uint32_t set = cell.reads >> READER_BITS, record = cell.write >> LANE_BITS;
  const uint32_t extra = record | 1u << 31;
  Step& step = step_of(set, extra);
  if (step.record != index_ || step.set != set || step.extra != extra) {
    uint32_t rest = set;
    while (rest != 0 && droppable(nodes_[rest], true)) rest = nodes_[rest].before;
    if (rest == set) rest = keep_several(rest, cell.reads % (1 << READER_BITS));
    const Record& other = records_[record];
    if (record != 0 && other.strand != made_.strand && !ordered_all(other, true))
      rest = push(rest, record, false, true);
    step = {set, index_, extra, rest, false};
  }
  return step.to << READER_BITS | SOME;
}

Conflict Shadow::read(Cell* cells, uint32_t count) {
  for (uint32_t first = 0; first < count;) {
    const uint32_t end = run_end(cells, first, count);
    const Cell cell = cells[first];
    if (!after_write(cell.write) ||
        (nodes_[cell.reads >> READER_BITS].any_wrote && !after_reads(cell.reads, true))) {
      conflict_.byte = first;
      return conflict_;
    }
    const uint32_t reads = with_read(cell.reads);
    for (; first < end; ++first) cells[first].reads = reads;
  }
  return {};
}

Conflict Shadow::write(Cell* cells, uint32_t count, const std::byte* before, const std::byte* after) {
  const Cell made{index_ << LANE_BITS | lane_, 0};
  for (uint32_t first = 0; first < count;) {
    const uint32_t end = run_end(cells, first, count);
    const Cell cell = cells[first];
    if (!after_reads(cell.reads, false)) {
      conflict_.byte = first;
      return conflict_;
    }
    if (!after_write(cell.write)) {
      uint32_t differs = first;
      while (differs < end && before[differs] == after[differs]) ++differs;
      conflict_.byte = differs < end ? differs : first;
      if (differs < end || (conflict_.other.flags & Record::ATOMIC) != 0) return conflict_;
    }
    for (; first < end; ++first) cells[first] = made;
  }
  return {};
}

Conflict Shadow::change(Cell* cells, uint32_t count) {
  for (uint32_t first = 0; first < count;) {
    const uint32_t end = run_end(cells, first, count);
    const Cell cell = cells[first];
    if (!after_write(cell.write) || !after_reads(cell.reads, false)) {
      conflict_.byte = first;
      return conflict_;
    }
    const Cell made{index_ << LANE_BITS | lane_, with_change(cell)};
    for (; first < end; ++first) cells[first] = made;
  }
  return {};
}

}  // namespace gpu

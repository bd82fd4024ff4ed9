// Branches and ends.
#include "control.h"

#include <algorithm>

#include "barriers.h"
#include "lanes.h"

namespace gpu {
namespace {

// Lanes leave their group for another place. What is left of the group goes on behind the instruction.
void go(Warp& warp, Mask lanes, uint32_t pc) {
  Group& group = warp.groups[warp.at_group];
  if (lanes == group.lanes) {
    group.pc = pc;
    return;
  }
  group.lanes &= ~lanes;
  warp.groups.push_back({pc, lanes});
}

// numbers: target, .uni.
Outcome branch(Warp& warp, const Instruction& at) {
  if (at.numbers[1] && warp.active != warp.group_lanes)
    fail(Kind::malformed, "lanes go different ways at a branch that is said to be uniform");
  const Mask stay = warp.group_lanes & ~warp.active;
  go(warp, warp.active, static_cast<uint32_t>(at.numbers[0]));
  if (stay != 0) warp.groups[warp.at_group].pc = at.pc + 1;
  return Outcome::jumped;
}

bool decode_branch(const Statement& given, Build& build, Instruction& to) {
  if (given.operands.size() != 1 || given.operands[0].is != Operand::Is::symbol) return false;
  int64_t* numbers = build.keep(std::vector<int64_t>{0, given.has("uni")});
  build.label(given.operands[0].name, numbers);
  to.step = branch;
  to.numbers = numbers;
  return true;
}

// rows: index. numbers: .uni, count, targets.
Outcome branch_by_index(Warp& warp, const Instruction& at) {
  const uint32_t* index = warp.row<uint32_t>(at.rows[0]);
  const Mask stay = warp.group_lanes & ~warp.active;
  Mask left = warp.active;
  const uint32_t count = static_cast<uint32_t>(at.numbers[1]);
  bool moved = false;  // whether the group itself went somewhere
  while (left != 0) {
    const uint32_t chosen = index[__builtin_ctz(left)];
    if (chosen >= count)
      throw Fault{Kind::malformed, text_of("index ", chosen, " of ", count, " targets"), __builtin_ctz(left)};
    Mask lanes = 0;
    for_lanes(left, [&](uint32_t lane) { lanes |= Mask(index[lane] == chosen) << lane; });
    left &= ~lanes;
    if (at.numbers[0] && (left | stay) != 0)
      fail(Kind::malformed, "lanes go different ways at a branch that is said to be uniform");
    moved = lanes == warp.groups[warp.at_group].lanes;
    go(warp, lanes, static_cast<uint32_t>(at.numbers[2 + chosen]));
  }
  if (!moved) warp.groups[warp.at_group].pc = at.pc + 1;
  return Outcome::jumped;
}

bool decode_branch_by_index(const Statement& given, Build& build, Instruction& to) {
  if (!given.has("idx") || given.operands.size() != 2) return false;
  const std::vector<std::string>* targets = build.targets(given.operands[1].name);
  if (targets == nullptr) return false;
  int64_t* numbers = build.keep(std::vector<int64_t>(2 + targets->size()));
  numbers[0] = given.has("uni");
  numbers[1] = static_cast<int64_t>(targets->size());
  for (size_t i = 0; i < targets->size(); ++i) build.label((*targets)[i], numbers + 2 + i);
  to.step = branch_by_index;
  to.row_count = 1;
  to.rows = build.keep(std::vector<Row>{build.row(given.operands[0], 4)});
  to.numbers = numbers;
  return true;
}

Outcome end(Warp& warp, const Instruction& at) {
  Group& group = warp.groups[warp.at_group];
  warp.live &= ~warp.active;
  group.lanes &= ~warp.active;
  group.pc = at.pc + 1;
  if (group.lanes == 0) warp.groups.erase(warp.groups.begin() + warp.at_group);
  // Others may wait for lanes that will not come: they find out by looking again.
  warp.unstick();
  lanes_ended(warp);
  return Outcome::jumped;
}

bool decode_end(const Statement& given, Build& build, Instruction& to) {
  if (!given.operands.empty()) return false;
  given.has("uni");
  finish(build, to, end, 0, {}, {});
  return true;
}

Outcome trap(Warp&, const Instruction&) { fail(Kind::malformed, "the kernel gave up (trap)"); }

bool decode_trap(const Statement& given, Build& build, Instruction& to) {
  if (!given.operands.empty()) return false;
  finish(build, to, trap, 0, {}, {});
  return true;
}

Outcome nothing(Warp&, const Instruction&) { return Outcome::next; }

bool decode_sleep(const Statement& given, Build& build, Instruction& to) {
  if (!given.has("u32") || given.operands.size() != 1) return false;
  finish(build, to, nothing, 0, rows_of(given, build, 4), {});
  return true;
}

// Launches run one after the other here: what a kernel would wait for has ended.
bool decode_dependent_launch(const Statement& given, Build& build, Instruction& to) {
  if (!given.operands.empty() || !(given.has("wait") || given.has("launch_dependents"))) return false;
  finish(build, to, nothing, 0, {}, {});
  return true;
}

}  // namespace

void add_control(Decoders& decoders) {
  decoders["bra"] = decode_branch;
  decoders["brx"] = decode_branch_by_index;
  decoders["ret"] = decode_end;
  decoders["exit"] = decode_end;
  decoders["trap"] = decode_trap;
  decoders["nanosleep"] = decode_sleep;
  decoders["griddepcontrol"] = decode_dependent_launch;
  add_lanes(decoders);
  add_barriers(decoders);
  add_mbarriers(decoders);
}

}  // namespace gpu

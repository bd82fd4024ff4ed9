// What lanes of a warp do together: votes, shuffles, reductions, elections, matches. Each needs every lane
// that its mask of members names.
#include "lanes.h"

#include <algorithm>

#include "control.h"

namespace gpu {
namespace {

// The mask of members, which all lanes that take part have to agree on.
Mask members_of(const Warp& warp, Row row) {
  const uint32_t* values = warp.row<uint32_t>(row);
  const Mask mask = values[__builtin_ctz(warp.active)];
  for_lanes(warp.active, [&](uint32_t lane) {
    if (values[lane] != mask) throw Fault{Kind::malformed, "lanes name different members", int(lane)};
    if (!(mask >> lane & 1))
      throw Fault{Kind::malformed, "a lane that it does not name as a member", int(lane)};
  });
  return mask;
}

bool all_here(Warp& warp, Row members) {
  const Mask mask = members_of(warp, members);
  if ((mask & ~warp.exists) != 0 && (mask & warp.exists & ~warp.live) != 0)
    fail(Kind::barrier, "members have ended");
  return together(warp, mask);
}

enum Vote : int64_t { all, any, uniform, ballot };

// rows: result, predicate, members.
Outcome vote(Warp& warp, const Instruction& at) {
  if (!all_here(warp, at.rows[2])) return Outcome::waits;
  const Mask given = (warp.mask(at.rows[1]) ^ (at.numbers[1] ? ALL : 0)) & warp.active;
  const bool every = given == warp.active, some = given != 0;
  if (at.numbers[0] == ballot) {
    uint32_t* to = warp.row<uint32_t>(at.rows[0]);
    for_lanes(warp.active, [&](uint32_t lane) { to[lane] = given; });
    return Outcome::next;
  }
  const bool result = at.numbers[0] == all ? every : at.numbers[0] == any ? some : every || !some;
  Mask& to = warp.mask(at.rows[0]);
  to = result ? to | warp.active : to & ~warp.active;
  return Outcome::next;
}

bool decode_vote(const Statement& given, Build& build, Instruction& to) {
  if (!given.has("sync") || given.operands.size() != 3) return false;
  int64_t mode = -1;
  if (given.has("all")) mode = all;
  if (given.has("any")) mode = any;
  if (given.has("uni")) mode = uniform;
  if (given.has("ballot")) mode = ballot;
  if (mode < 0 || !(mode == ballot ? given.has("b32") : given.has("pred"))) return false;
  const Row result = mode == ballot ? build.row(given.operands[0], 4) : build.predicate(given.operands[0]);
  finish(build, to, vote, 1, {result, build.predicate(given.operands[1]), build.row(given.operands[2], 4)},
         {mode, given.operands[1].negated});
  return true;
}

enum Shuffle : int64_t { up, down, butterfly, index };

// The lane that `lane` reads from, and whether it is in range (as the PTX manual defines shfl).
std::pair<uint32_t, bool> source(int64_t mode, uint32_t lane, uint32_t b, uint32_t c) {
  const uint32_t segment = c >> 8 & 31, clamp = c & 31;
  const uint32_t first = lane & segment, last = first | (clamp & ~segment);
  b &= 31;
  int64_t from = 0;
  bool fits = false;
  switch (mode) {
    case up:
      from = int64_t(lane) - b;
      fits = from >= int64_t(last);
      break;
    case down:
      from = int64_t(lane) + b;
      fits = from <= int64_t(last);
      break;
    case butterfly:
      from = lane ^ b;
      fits = from <= int64_t(last);
      break;
    default:
      from = first | (b & ~segment);
      fits = from <= int64_t(last);
  }
  return {fits ? static_cast<uint32_t>(from) : lane, fits};
}

// rows: result, [predicate], value, b, c, members.
Outcome shuffle(Warp& warp, const Instruction& at) {
  const Row* rows = at.rows + at.results;
  if (!all_here(warp, rows[3])) return Outcome::waits;
  const uint32_t* const given = warp.row<uint32_t>(rows[0]);
  uint32_t value[LANES];
  std::copy_n(given, LANES, value);
  const uint32_t *b = warp.row<uint32_t>(rows[1]), *c = warp.row<uint32_t>(rows[2]);
  uint32_t* to = warp.row<uint32_t>(at.rows[0]);
  uint32_t b_of[LANES], c_of[LANES];
  std::copy_n(b, LANES, b_of);
  std::copy_n(c, LANES, c_of);
  Mask in_range = 0;
  for_lanes(warp.active, [&](uint32_t lane) {
    const auto [from, fits] = source(at.numbers[0], lane, b_of[lane], c_of[lane]);
    if (!(warp.active >> from & 1))
      throw Fault{Kind::malformed, text_of("reads lane ", from, ", which does not take part"), int(lane)};
    to[lane] = value[from];
    in_range |= Mask(fits) << lane;
  });
  if (at.results == 2 && at.rows[1] != NONE) {
    Mask& fits = warp.mask(at.rows[1]);
    fits = (fits & ~warp.active) | in_range;
  }
  return Outcome::next;
}

bool decode_shuffle(const Statement& given, Build& build, Instruction& to) {
  if (!given.has("sync") || !given.has("b32") || given.operands.size() != 5) return false;
  int64_t mode = -1;
  if (given.has("up")) mode = up;
  if (given.has("down")) mode = down;
  if (given.has("bfly")) mode = butterfly;
  if (given.has("idx")) mode = index;
  if (mode < 0) return false;
  std::vector<Row> rows = results_of(given.operands[0], build, 4);
  const uint32_t results = static_cast<uint32_t>(rows.size());
  for (int i = 1; i < 5; ++i) rows.push_back(build.row(given.operands[i], 4));
  finish(build, to, shuffle, results, std::move(rows), {mode});
  return true;
}

enum Reduction : int64_t { add, minimum, maximum, bit_and, bit_or, bit_xor };

template <class T>
T reduced(int64_t mode, T a, T b) {
  switch (mode) {
    case add:
      return a + b;
    case minimum:
      return std::min(a, b);
    case maximum:
      return std::max(a, b);
    case bit_and:
      return a & b;
    case bit_or:
      return a | b;
    default:
      return a ^ b;
  }
}

// rows: result, value, members.
template <class T>
Outcome reduce(Warp& warp, const Instruction& at) {
  if (!all_here(warp, at.rows[2])) return Outcome::waits;
  const T* const given = warp.row<T>(at.rows[1]);
  T total = given[__builtin_ctz(warp.active)];
  for_lanes(warp.active & (warp.active - 1),
            [&](uint32_t lane) { total = reduced<T>(at.numbers[0], total, given[lane]); });
  T* to = warp.row<T>(at.rows[0]);
  for_lanes(warp.active, [&](uint32_t lane) { to[lane] = total; });
  return Outcome::next;
}

bool decode_reduce(const Statement& given, Build& build, Instruction& to) {
  static const std::pair<const char*, Reduction> modes[] = {
      {"add", add}, {"min", minimum}, {"max", maximum}, {"and", bit_and}, {"or", bit_or}, {"xor", bit_xor}};
  int64_t mode = -1;
  for (const auto& [name, value] : modes)
    if (given.has(name)) mode = value;
  if (mode < 0 || !given.has("sync") || given.operands.size() != 3) return false;
  const bool is_signed = given.has("s32");
  if (!is_signed && !given.has("u32") && !given.has("b32")) return false;
  finish(build, to, is_signed ? reduce<int32_t> : reduce<uint32_t>, 1, rows_of(given, build, 4), {mode});
  return true;
}

// rows: leader, predicate, members.
Outcome elect(Warp& warp, const Instruction& at) {
  if (!all_here(warp, at.rows[2])) return Outcome::waits;
  const uint32_t leader = __builtin_ctz(warp.active);
  if (at.rows[0] != NONE) {
    uint32_t* to = warp.row<uint32_t>(at.rows[0]);
    for_lanes(warp.active, [&](uint32_t lane) { to[lane] = leader; });
  }
  Mask& chosen = warp.mask(at.rows[1]);
  chosen = (chosen & ~warp.active) | (Mask(1) << leader);
  return Outcome::next;
}

bool decode_elect(const Statement& given, Build& build, Instruction& to) {
  if (!given.has("sync") || given.operands.size() != 2) return false;
  std::vector<Row> rows = results_of(given.operands[0], build, 4);
  if (rows.size() != 2) return false;
  rows.push_back(build.row(given.operands[1], 4));
  finish(build, to, elect, 2, std::move(rows), {});
  return true;
}

// rows: result, value, members.
template <class T>
Outcome match(Warp& warp, const Instruction& at) {
  if (!all_here(warp, at.rows[2])) return Outcome::waits;
  const T* const given = warp.row<T>(at.rows[1]);
  uint32_t found[LANES] = {};
  for_lanes(warp.active, [&](uint32_t lane) {
    for_lanes(warp.active,
              [&](uint32_t other) { found[lane] |= Mask(given[other] == given[lane]) << other; });
  });
  uint32_t* to = warp.row<uint32_t>(at.rows[0]);
  for_lanes(warp.active, [&](uint32_t lane) { to[lane] = found[lane]; });
  return Outcome::next;
}

bool decode_match(const Statement& given, Build& build, Instruction& to) {
  if (!given.has("any") || !given.has("sync") || given.operands.size() != 3) return false;
  const uint32_t width = given.has("b64") ? 8 : given.has("b32") ? 4 : 0;
  if (width == 0) return false;
  std::vector<Row> rows = {build.row(given.operands[0], 4), build.row(given.operands[1], width),
                           build.row(given.operands[2], 4)};
  finish(build, to, width == 8 ? match<uint64_t> : match<uint32_t>, 1, std::move(rows), {});
  return true;
}

Outcome active_mask(Warp& warp, const Instruction& at) {
  uint32_t* to = warp.row<uint32_t>(at.rows[0]);
  for_lanes(warp.active, [&](uint32_t lane) { to[lane] = warp.active; });
  return Outcome::next;
}

bool decode_active_mask(const Statement& given, Build& build, Instruction& to) {
  if (!given.has("b32") || given.operands.size() != 1) return false;
  finish(build, to, active_mask, 1, rows_of(given, build, 4), {});
  return true;
}

// rows: members.
Outcome warp_barrier(Warp& warp, const Instruction& at) {
  if (!all_here(warp, at.rows[0])) return Outcome::waits;
  synchronise(warp, warp.active);
  return Outcome::next;
}

}  // namespace

bool decode_warp_barrier(const Statement& given, Build& build, Instruction& to) {
  if (given.operands.size() != 1) return false;
  finish(build, to, warp_barrier, 0, rows_of(given, build, 4), {});
  return true;
}

void add_lanes(Decoders& decoders) {
  decoders["vote"] = decode_vote;
  decoders["shfl"] = decode_shuffle;
  decoders["redux"] = decode_reduce;
  decoders["elect"] = decode_elect;
  decoders["match"] = decode_match;
  decoders["activemask"] = decode_active_mask;
}

}  // namespace gpu

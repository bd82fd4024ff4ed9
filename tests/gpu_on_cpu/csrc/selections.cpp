// Moves and selections.
#include <map>

#include "arithmetic.h"
#include "fault.h"

namespace gpu {
namespace {

template <class Part, class Whole>
constexpr int COUNT = sizeof(Whole) / sizeof(Part);
template <class Part>
using Stored = std::conditional_t<sizeof(Part) == 1, uint16_t, Part>;  // a byte's register has two

// rows: the whole, its parts from the lowest
template <class Part, class Whole>
Outcome pack(Warp& warp, const Instruction& at) {
  Part parts[LANES][COUNT<Part, Whole>];
  for (int i = 0; i < COUNT<Part, Whole>; ++i) {
    const Stored<Part>* from = warp.row<Stored<Part>>(at.rows[1 + i]);
    for (int lane = 0; lane < LANES; ++lane) parts[lane][i] = static_cast<Part>(from[lane]);
  }
  Whole results[LANES];
  std::memcpy(results, parts, sizeof results);
  store(warp, at.rows[0], results);
  return Outcome::next;
}

// rows: the parts from the lowest, those that are not wanted as NONE, the whole
template <class Part, class Whole>
Outcome unpack(Warp& warp, const Instruction& at) {
  Part parts[LANES][COUNT<Part, Whole>];
  Stored<Part> results[LANES];
  std::memcpy(parts, warp.row<Whole>(at.rows[COUNT<Part, Whole>]), sizeof parts);
  for (int i = 0; i < COUNT<Part, Whole>; ++i) {
    for (int lane = 0; lane < LANES; ++lane) results[lane] = parts[lane][i];
    store(warp, at.rows[i], results);
  }
  return Outcome::next;
}

template <class T>
Outcome copy(Warp& warp, const Instruction& at) {
  store(warp, at.rows[0], warp.row<T>(at.rows[1]));
  return Outcome::next;
}

struct Move {
  Step pack, unpack;
};

const Move* move_of(uint32_t width, size_t parts) {
  using Wide = unsigned __int128;
  static const std::map<std::pair<uint32_t, size_t>, Move> moves = {
      {{2, 1}, {copy<uint16_t>, copy<uint16_t>}},
      {{4, 1}, {copy<uint32_t>, copy<uint32_t>}},
      {{8, 1}, {copy<uint64_t>, copy<uint64_t>}},
      {{16, 1}, {copy<Wide>, copy<Wide>}},
      {{2, 2}, {pack<uint8_t, uint16_t>, unpack<uint8_t, uint16_t>}},
      {{4, 4}, {pack<uint8_t, uint32_t>, unpack<uint8_t, uint32_t>}},
      {{4, 2}, {pack<uint16_t, uint32_t>, unpack<uint16_t, uint32_t>}},
      {{8, 2}, {pack<uint32_t, uint64_t>, unpack<uint32_t, uint64_t>}},
      {{8, 4}, {pack<uint16_t, uint64_t>, unpack<uint16_t, uint64_t>}},
      {{16, 2}, {pack<uint64_t, Wide>, unpack<uint64_t, Wide>}},
      {{16, 4}, {pack<uint32_t, Wide>, unpack<uint32_t, Wide>}},
  };
  const auto found = moves.find({width, parts});
  return found == moves.end() ? nullptr : &found->second;
}

bool decode_mov_predicate(const Statement& given, Build& build, Instruction& to) {
  if (given.operands[0].is != Operand::Is::reg || given.operands[1].negated) return false;
  const auto step = [](Warp& warp, const Instruction& at) {
    store_mask(warp, at.rows[0], warp.mask(at.rows[1]));
    return Outcome::next;
  };
  finish(build, to, step, 1, {build.predicate(given.operands[0]), build.predicate(given.operands[1])}, {});
  return true;
}

bool decode_mov(const Statement& given, Build& build, Instruction& to) {
  static const std::unordered_map<std::string, uint32_t> widths = {
      {"b16", 2}, {"u16", 2}, {"s16", 2}, {"f16", 2}, {"bf16", 2}, {"b32", 4}, {"u32", 4},
      {"s32", 4}, {"f32", 4}, {"b64", 8}, {"u64", 8}, {"s64", 8},  {"f64", 8}, {"b128", 16}};
  const auto width = widths.find(given.parts.back());
  if (given.parts.size() != 2 || given.operands.size() != 2 ||
      !takes_constant(given.parts[1], given.operands[1])) {
    return false;
  }
  given.has(given.parts[1]);
  if (given.parts[1] == "pred") return decode_mov_predicate(given, build, to);
  if (width == widths.end()) return false;
  const auto parts_of = [](const Operand& operand) {
    return operand.is == Operand::Is::vector ? operand.parts : std::vector<Operand>{operand};
  };
  const std::vector<Operand> results = parts_of(given.operands[0]), sources = parts_of(given.operands[1]);
  const bool packs = sources.size() > 1;
  if (packs && results.size() > 1) return false;
  const size_t parts = std::max(results.size(), sources.size());
  const Move* move = move_of(width->second, parts);
  if (move == nullptr) return false;
  const uint32_t part = std::max(width->second / static_cast<uint32_t>(parts), 2u);
  std::vector<Row> rows;
  for (const Operand& operand : results) rows.push_back(build.row(operand, packs ? width->second : part));
  for (const Operand& operand : sources) rows.push_back(build.row(operand, packs ? part : width->second));
  finish(build, to, packs ? move->pack : move->unpack, static_cast<uint32_t>(results.size()), std::move(rows),
         {});
  return true;
}

template <class F, size_t... I>
Outcome masks_of(Warp& warp, const Instruction& at, std::index_sequence<I...>) {
  store_mask(warp, at.rows[0], F{}(warp.mask(at.rows[1 + I])...));
  return Outcome::next;
}

template <size_t OPERANDS, class F>
void define_logic(Forms& forms, const std::string& opcode, F) {
  constexpr auto step = [](Warp& warp, const Instruction& at) {
    return masks_of<F>(warp, at, std::make_index_sequence<OPERANDS>{});
  };
  forms[opcode + ".pred"] = {step, std::vector<uint32_t>(1 + OPERANDS, 0)};
}

template <class T>
Outcome select(Warp& warp, const Instruction& at) {
  const T *a = warp.row<T>(at.rows[1]), *b = warp.row<T>(at.rows[2]);
  const Mask which = warp.mask(at.rows[3]);
  T results[LANES];
  for (int lane = 0; lane < LANES; ++lane) results[lane] = which >> lane & 1 ? a[lane] : b[lane];
  store(warp, at.rows[0], results);
  return Outcome::next;
}

template <class T>
void define_selection(Forms& forms, const std::string& type) {
  forms["selp." + type] = {select<T>, {sizeof(T), sizeof(T), sizeof(T), 0}};
  define_one<T, T, int32_t>(forms, "slct." + type + ".s32",
                            [](T a, T b, int32_t c) { return c >= 0 ? a : b; });
  define_one<T, T, float>(forms, "slct." + type + ".f32", [](T a, T b, float c) { return c >= 0 ? a : b; });
}

}  // namespace

void define_selections(Forms& forms) {
  for (const char* letter : {"b", "u", "s"}) {
    define_selection<uint16_t>(forms, std::string(letter) + "16");
    define_selection<uint32_t>(forms, std::string(letter) + "32");
    define_selection<uint64_t>(forms, std::string(letter) + "64");
  }
  define_selection<uint32_t>(forms, "f32");
  define_selection<uint64_t>(forms, "f64");
  define_logic<2>(forms, "and", [](Mask a, Mask b) { return a & b; });
  define_logic<2>(forms, "or", [](Mask a, Mask b) { return a | b; });
  define_logic<2>(forms, "xor", [](Mask a, Mask b) { return a ^ b; });
  define_logic<1>(forms, "not", [](Mask a) { return ~a; });
}

void add_moves(Decoders& decoders) { decoders["mov"] = decode_mov; }

}  // namespace gpu

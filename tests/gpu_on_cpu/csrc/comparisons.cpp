// setp and set.
#include <cmath>
#include <limits>
#include <map>

#include "arithmetic.h"

namespace gpu {
namespace {

// A comparison is a set of the relations that two values can have.
enum Relation : uint32_t { LESS = 1, EQUAL = 2, GREATER = 4, UNORDERED = 8 };

const uint32_t* comparison_of(const std::string& name) {
  static const std::unordered_map<std::string, uint32_t> comparisons = {
      {"eq", EQUAL},
      {"ne", LESS | GREATER},
      {"lt", LESS},
      {"le", LESS | EQUAL},
      {"gt", GREATER},
      {"ge", GREATER | EQUAL},
      {"lo", LESS},
      {"ls", LESS | EQUAL},
      {"hi", GREATER},
      {"hs", GREATER | EQUAL},
      {"equ", UNORDERED | EQUAL},
      {"neu", UNORDERED | LESS | GREATER},
      {"ltu", UNORDERED | LESS},
      {"leu", UNORDERED | LESS | EQUAL},
      {"gtu", UNORDERED | GREATER},
      {"geu", UNORDERED | GREATER | EQUAL},
      {"num", LESS | EQUAL | GREATER},
      {"nan", UNORDERED},
  };
  const auto found = comparisons.find(name);
  return found == comparisons.end() ? nullptr : &found->second;
}

enum class Joined : int64_t { none, with_and, with_or, with_xor };

Mask joined(Mask a, Mask b, Joined how) {
  switch (how) {
    case Joined::with_and:
      return a & b;
    case Joined::with_or:
      return a | b;
    case Joined::with_xor:
      return a ^ b;
    default:
      return a;
  }
}

// numbers: the comparison, .ftz, how setp's third operand joins and whether it is negated, set's value where
// it holds
enum { COMPARISON, FLUSHES, HOW, NEGATED, VALUE };

// Of EACH values that a lane has, the one numbered `part`.
template <class T, int EACH = 1>
Mask compare(Warp& warp, const Instruction& at, Row first, Row second, int part = 0) {
  const T *a = warp.row<T>(first) + part, *b = warp.row<T>(second) + part;
  decltype(value_of(T{})) x[LANES], y[LANES];
  bool less[LANES], equal[LANES], greater[LANES];
  for (int i = 0; i < LANES; ++i) x[i] = value_of(a[i * EACH]), y[i] = value_of(b[i * EACH]);
  if constexpr (std::is_same_v<T, float>) {
    for (int i = 0; at.numbers[FLUSHES] != 0 && i < LANES; ++i) {
      x[i] = std::abs(x[i]) < std::numeric_limits<T>::min() ? 0 : x[i];
      y[i] = std::abs(y[i]) < std::numeric_limits<T>::min() ? 0 : y[i];
    }
  }
  for (int i = 0; i < LANES; ++i) less[i] = x[i]<y[i], equal[i] = x[i] == y[i], greater[i] = x[i]> y[i];
  const Mask masks[] = {mask_of(less), mask_of(equal), mask_of(greater)};
  const Mask unordered = ~(masks[0] | masks[1] | masks[2]);
  const int64_t wanted = at.numbers[COMPARISON];
  return (wanted & LESS ? masks[0] : 0) | (wanted & EQUAL ? masks[1] : 0) |
         (wanted & GREATER ? masks[2] : 0) | (wanted & UNORDERED ? unordered : 0);
}

// rows: p, q (or none), a, b, c (or none)
template <class T>
Outcome set_predicates(Warp& warp, const Instruction& at) {
  const Mask found = compare<T>(warp, at, at.rows[2], at.rows[3]);
  const Joined how = static_cast<Joined>(at.numbers[HOW]);
  const Mask other = how == Joined::none ? 0 : warp.mask(at.rows[4]) ^ (at.numbers[NEGATED] ? ALL : 0);
  store_mask(warp, at.rows[0], joined(found, other, how));
  store_mask(warp, at.rows[1], joined(~found, other, how));
  return Outcome::next;
}

// rows: p of the lower halves, q of the upper ones, a, b, c (or none)
template <class T>
Outcome set_predicates_of_pairs(Warp& warp, const Instruction& at) {
  const Joined how = static_cast<Joined>(at.numbers[HOW]);
  const Mask other = how == Joined::none ? 0 : warp.mask(at.rows[4]) ^ (at.numbers[NEGATED] ? ALL : 0);
  const Mask lower = compare<T, 2>(warp, at, at.rows[2], at.rows[3], 0);
  const Mask upper = compare<T, 2>(warp, at, at.rows[2], at.rows[3], 1);
  store_mask(warp, at.rows[0], joined(lower, other, how));
  store_mask(warp, at.rows[1], joined(upper, other, how));
  return Outcome::next;
}

// rows: d, a, b
template <class T>
Outcome set_value(Warp& warp, const Instruction& at) {
  const Mask found = compare<T>(warp, at, at.rows[1], at.rows[2]);
  const uint32_t value = static_cast<uint32_t>(at.numbers[VALUE]);
  uint32_t results[LANES];
  for (int lane = 0; lane < LANES; ++lane) results[lane] = found >> lane & 1 ? value : 0;
  store(warp, at.rows[0], results);
  return Outcome::next;
}

struct Compared {
  Step predicates, value;
  uint32_t width;
  bool real;
  bool pair = false;
};

template <class T>
constexpr Compared COMPARED = {set_predicates<T>, set_value<T>, sizeof(T), is_real<T>};

template <class T>
constexpr Compared COMPARED_PAIR = {set_predicates_of_pairs<T>, nullptr, 2 * sizeof(T), true, true};

const Compared* compared(const std::string& type) {
  static const std::unordered_map<std::string, const Compared*> all = {
      {"b16", &COMPARED<uint16_t>}, {"b32", &COMPARED<uint32_t>},    {"b64", &COMPARED<uint64_t>},
      {"u16", &COMPARED<uint16_t>}, {"u32", &COMPARED<uint32_t>},    {"u64", &COMPARED<uint64_t>},
      {"s16", &COMPARED<int16_t>},  {"s32", &COMPARED<int32_t>},     {"s64", &COMPARED<int64_t>},
      {"f16", &COMPARED<Half>},     {"bf16", &COMPARED<Bfloat>},     {"f32", &COMPARED<float>},
      {"f64", &COMPARED<double>},   {"f16x2", &COMPARED_PAIR<Half>}, {"bf16x2", &COMPARED_PAIR<Bfloat>},
  };
  const auto found = all.find(type);
  return found == all.end() ? nullptr : found->second;
}

// What the opcodes share: the comparison, .ftz and the type. Nullptr where one of them is not known.
const Compared* read_comparison(const Statement& given, std::vector<int64_t>& numbers) {
  const std::string& type = given.parts.back();
  const uint32_t* comparison = given.parts.size() < 3 ? nullptr : comparison_of(given.parts[1]);
  const Compared* found = compared(type);
  if (comparison == nullptr || found == nullptr) return nullptr;
  if (!found->real && (*comparison & UNORDERED) != 0) return nullptr;
  for (const std::string& part : {given.parts[1], type}) given.has(part);
  for (const Operand& operand : given.operands)
    if (!takes_constant(type, operand)) return nullptr;
  numbers = {*comparison, type == "f32" && given.has("ftz")};
  return found;
}

bool decode_setp(const Statement& given, Build& build, Instruction& to) {
  static const std::map<std::string, Joined> joins = {
      {"and", Joined::with_and}, {"or", Joined::with_or}, {"xor", Joined::with_xor}};
  std::vector<int64_t> numbers;
  const Compared* type = read_comparison(given, numbers);
  if (type == nullptr) return false;
  const auto join = joins.find(given.parts[2]);
  const bool joins_third = join != joins.end();
  if (given.operands.size() != (joins_third ? 4u : 3u)) return false;
  const Operand& result = given.operands[0];
  const bool two = result.is == Operand::Is::vector;
  if (type->pair && !two) return false;
  if (two && result.parts.size() != 2) return false;
  std::vector<Row> rows = {
      build.predicate(two ? result.parts[0] : result), two ? build.predicate(result.parts[1]) : NONE,
      build.row(given.operands[1], type->width), build.row(given.operands[2], type->width)};
  if (joins_third) {
    given.has(join->first);
    rows.push_back(build.predicate(given.operands[3]));
    numbers.insert(numbers.end(), {static_cast<int64_t>(join->second), given.operands[3].negated});
  } else {
    numbers.insert(numbers.end(), {static_cast<int64_t>(Joined::none), false});
  }
  finish(build, to, type->predicates, 2, std::move(rows), std::move(numbers));
  return true;
}

// Where it holds, all bits or 1.0.
bool decode_set(const Statement& given, Build& build, Instruction& to) {
  std::vector<int64_t> numbers;
  const Compared* type = read_comparison(given, numbers);
  if (type == nullptr || type->pair || given.operands.size() != 3) return false;
  const std::string& result = given.parts[given.parts.size() - 2];
  if (result != "u32" && result != "s32" && result != "f32") return false;
  given.has(result);
  numbers.insert(numbers.end(),
                 {static_cast<int64_t>(Joined::none), false, result == "f32" ? 0x3f800000 : ALL});
  finish(build, to, type->value, 1,
         {build.row(given.operands[0], 4), build.row(given.operands[1], type->width),
          build.row(given.operands[2], type->width)},
         std::move(numbers));
  return true;
}

}  // namespace

void add_comparisons(Decoders& decoders) {
  decoders["setp"] = decode_setp;
  decoders["set"] = decode_set;
}

}  // namespace gpu

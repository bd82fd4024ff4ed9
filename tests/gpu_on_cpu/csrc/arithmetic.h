// Steps from register to register, made from functions of one lane's values.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "control.h"
#include "formats.h"

namespace gpu {

// A modifier that many opcodes take.
enum Modifier : uint32_t {
  FTZ = 1,
  SAT = 2,
  RELU = 4,
  FINITE = 8,
  APPROXIMATE = 16,  // .approx and .full: correctly rounded as well
  NEAREST = 32,      // .rn
  DIRECTED = 64,     // .rz, .rm and .rp
  AWAY = 128,        // .rna
  ROUNDS = NEAREST | DIRECTED | AWAY,
};

struct Form {
  Step step;
  std::vector<uint32_t> widths;  // of the operands, the result's first; 0: a predicate
  uint32_t modifiers = 0;        // those it takes
};

// Forms by their opcode, without the modifiers that they take.
using Forms = std::unordered_map<std::string, Form>;

void define_integers(Forms& forms);
void define_reals(Forms& forms);
void define_selections(Forms& forms);
void add_conversions(Decoders& decoders);  // cvt
void add_comparisons(Decoders& decoders);  // setp, set
void add_moves(Decoders& decoders);        // mov

// The modifiers of a statement, marked as understood.
struct Modifiers {
  uint32_t given = 0;
  Round round = Round::nearest;
  bool integral = false;  // .rni and its kin
};
Modifiers read_modifiers(const Statement& given);

// Whether a constant can be an operand of a type: no integer for an f32, no real for an s32.
bool takes_constant(const std::string& type, const Operand& operand);

// Types of a family of opcodes, such as u16, u32 and u64.
template <class... Ts>
struct Types {
  std::string_view letter;
};
template <class T>
std::string name_of(std::string_view letter) {
  return std::string(letter) + std::to_string(8 * sizeof(T));
}
constexpr Types<uint16_t, uint32_t, uint64_t> BITS{"b"}, UNSIGNED{"u"};
constexpr Types<int16_t, int32_t, int64_t> SIGNED{"s"};

template <class T>
constexpr uint32_t width_of() {
  return std::is_same_v<T, bool> ? 0 : sizeof(T);
}

template <class T>
void store(Warp& warp, Row row, const T* values) {
  if (row == NONE) return;
  T* to = warp.row<T>(row);
  if (warp.active == ALL) {
    std::memcpy(to, values, LANES * sizeof(T));
  } else {
    for (int lane = 0; lane < LANES; ++lane)
      if (warp.active >> lane & 1) to[lane] = values[lane];
  }
}

inline void store_mask(Warp& warp, Row row, Mask values) {
  if (row != NONE) warp.mask(row) = (warp.mask(row) & ~warp.active) | (values & warp.active);
}

// A bit for each lane, from a byte that is 0 or 1.
inline Mask mask_of(const bool (&values)[LANES]) {
  Mask mask = 0;
  for (int at = 0; at < LANES; at += 8) {
    uint64_t eight;
    std::memcpy(&eight, values + at, 8);
    mask |= static_cast<Mask>((eight * 0x0102040810204080u) >> 56) << at;
  }
  return mask;
}

template <class F, class R, class... A, size_t... I>
Outcome each_of(Warp& warp, const Instruction& at, std::index_sequence<I...>) {
  R results[LANES];
  const auto given = std::make_tuple(static_cast<const A*>(warp.row<A>(at.rows[1 + I]))...);
  for (int lane = 0; lane < LANES; ++lane) results[lane] = F{}(std::get<I>(given)[lane]...);
  if constexpr (std::is_same_v<R, bool>) {
    store_mask(warp, at.rows[0], mask_of(results));
  } else {
    store(warp, at.rows[0], results);
  }
  return Outcome::next;
}

// Computed for all lanes, those that are off too, and stored for the active ones.
template <class F, class... A>
Outcome each(Warp& warp, const Instruction& at) {
  return each_of<F, std::invoke_result_t<F, A...>, A...>(warp, at, std::index_sequence_for<A...>{});
}

// One opcode with a function of values of types A.
template <class... A, class F>
void define_one(Forms& forms, std::string opcode, F) {
  using R = std::invoke_result_t<F, A...>;
  forms[std::move(opcode)] = {each<F, A...>, {width_of<R>(), width_of<A>()...}};
}

struct It {};  // stands for each type of a family
template <class A, class T>
using Filled = std::conditional_t<std::is_same_v<A, It>, T, A>;

template <class T, class... A, class F>
void define_for(Forms& forms, std::string opcode, F f) {
  define_one<Filled<A, T>...>(forms, std::move(opcode), f);
}

// An opcode for each type of a family: `opcode`.u16 and so on.
template <class... A, class F, class... Ts>
void define(Forms& forms, const std::string& opcode, Types<Ts...> types, F f) {
  (define_for<Ts, A...>(forms, opcode + '.' + name_of<Ts>(types.letter), f), ...);
}

}  // namespace gpu

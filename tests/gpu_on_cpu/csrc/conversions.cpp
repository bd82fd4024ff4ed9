// cvt: between all integers and reals, and to packed pairs of narrow reals.
#include <algorithm>
#include <array>
#include <cmath>

#include "arithmetic.h"

namespace gpu {
namespace {

// numbers of cvt: modifiers, rounding, whether to an integral value, bytes of the registers
enum { GIVEN, ROUND, INTEGRAL, TO_WIDTH, FROM_WIDTH };

template <class T>
T flushed(T x) {
  return std::abs(x) < std::numeric_limits<float>::min() ? std::copysign(T{0}, x) : x;
}

template <class Real>
Real integral(Real x, Round round) {
  switch (round) {
    case Round::zero:
      return std::trunc(x);
    case Round::down:
      return std::floor(x);
    case Round::up:
      return std::ceil(x);
    default:
      return std::nearbyint(x);
  }
}

// An integer that float64 has, with the same code in any narrow format: what is lost of 64 bits sets a lower
// one.
template <class T>
double narrowable(T x) {
  if constexpr (sizeof(T) == 8) {
    const T beyond = x >> 53;
    if (beyond != 0 && beyond != static_cast<T>(-1)) {
      x = static_cast<T>((x & ~T{0xfff}) | ((x & 0xfff) != 0 ? 0x800 : 0));
    }
  }
  return static_cast<double>(x);
}

template <class To, class From>
To integer_of_integer(From x, bool saturates) {
  if (!saturates) return static_cast<To>(x);
  if (std::cmp_less(x, std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (std::cmp_greater(x, std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return static_cast<To>(x);
}

// Values beyond the integer's are its last ones. What a NaN becomes is as the PTX manual has it.
template <class To, class From>
To integer_of_real(From x, Round round) {
  if (x != x) {
    const bool zero = sizeof(From) < 8 && sizeof(To) < 8;
    return zero ? To{0} : static_cast<To>(uint64_t{1} << (8 * sizeof(To) - 1));
  }
  const double whole = integral(static_cast<double>(x), round);
  const double beyond = std::ldexp(1.0, std::numeric_limits<To>::digits);
  if (whole >= beyond) return std::numeric_limits<To>::max();
  if (whole <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  return static_cast<To>(whole);
}

template <class To, class From>
To real_of_real(From x, uint32_t given, Round round, bool to_integral) {
  if (to_integral) x = integral(x, round);
  if ((given & SAT) != 0) x = x > 0 ? (x < 1 ? x : 1) : 0;
  if ((given & RELU) != 0 && x <= 0) x = 0;
  To result = real_of<To>(x, round, (given & FINITE) != 0);
  if constexpr (std::is_same_v<To, float>) {
    if ((given & FTZ) != 0) result = flushed(result);
  }
  return result;
}

template <class To, class From>
To converted(From x, uint32_t given, Round round, bool to_integral) {
  if constexpr (!is_real<To> && !is_real<From>) {
    return integer_of_integer<To>(x, (given & SAT) != 0);
  } else if constexpr (!is_real<From>) {
    if constexpr (is_narrow<To>) return real_of_real<To>(narrowable(x), given, round, false);
    return real_of_real<To>(static_cast<decltype(value_of(To{}))>(x), given, round, false);
  } else {
    auto value = value_of(x);
    if constexpr (std::is_same_v<From, float>) value = (given & FTZ) != 0 ? flushed(value) : value;
    if constexpr (is_real<To>) {
      return real_of_real<To>(value, given, round, to_integral);
    } else {
      return integer_of_real<To>(value, round);
    }
  }
}

// Registers may be wider than the types: the lower bytes count, and a result's sign is extended.
template <class From>
void gather(const std::byte* row, int64_t width, From* to) {
  if (width == sizeof(From)) {
    std::memcpy(to, row, LANES * sizeof(From));
  } else {
    for (int i = 0; i < LANES; ++i) std::memcpy(&to[i], row + i * width, sizeof(From));
  }
}

template <class Register, class To>
void store_extended(Warp& warp, Row row, const To* from) {
  Register results[LANES];
  for (int i = 0; i < LANES; ++i) results[i] = static_cast<Register>(from[i]);
  store(warp, row, results);
}

template <class To>
void scatter(Warp& warp, Row row, int64_t width, const To* from) {
  if constexpr (is_real<To>) {
    store(warp, row, from);
  } else if (width == 2) {
    store_extended<uint16_t>(warp, row, from);
  } else if (width == 4) {
    store_extended<uint32_t>(warp, row, from);
  } else {
    store_extended<uint64_t>(warp, row, from);
  }
}

template <class To, class From>
Outcome convert(Warp& warp, const Instruction& at) {
  const uint32_t given = static_cast<uint32_t>(at.numbers[GIVEN]);
  const Round round = static_cast<Round>(at.numbers[ROUND]);
  const bool to_integral = at.numbers[INTEGRAL] != 0;
  From from[LANES];
  To results[LANES];
  gather(warp.row<std::byte>(at.rows[1]), at.numbers[FROM_WIDTH], from);
  {
    const Rounding rounding(is_narrow<To> || to_integral ? Round::nearest : round, from, results);
    if ((given & ~NEAREST) == 0 && round == Round::nearest) {
      for (int i = 0; i < LANES; ++i)
        results[i] = converted<To>(from[i], NEAREST, Round::nearest, to_integral);
    } else {
      for (int i = 0; i < LANES; ++i) results[i] = converted<To>(from[i], given, round, to_integral);
    }
  }
  scatter(warp, at.rows[0], at.numbers[TO_WIDTH], results);
  return Outcome::next;
}

constexpr std::array NAMES = {"u8",  "s8",  "u16", "s16",  "u32", "s32",
                              "u64", "s64", "f16", "bf16", "f32", "f64"};
constexpr uint32_t WIDTHS[] = {1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4, 8};
constexpr size_t FIRST_REAL = 8, KINDS = NAMES.size();

template <class To>
constexpr std::array<Step, KINDS> FROM_ALL = {
    convert<To, uint8_t>,  convert<To, int8_t>,  convert<To, uint16_t>, convert<To, int16_t>,
    convert<To, uint32_t>, convert<To, int32_t>, convert<To, uint64_t>, convert<To, int64_t>,
    convert<To, Half>,     convert<To, Bfloat>,  convert<To, float>,    convert<To, double>};

constexpr std::array<const std::array<Step, KINDS>*, KINDS> STEPS = {
    &FROM_ALL<uint8_t>,  &FROM_ALL<int8_t>,  &FROM_ALL<uint16_t>, &FROM_ALL<int16_t>,
    &FROM_ALL<uint32_t>, &FROM_ALL<int32_t>, &FROM_ALL<uint64_t>, &FROM_ALL<int64_t>,
    &FROM_ALL<Half>,     &FROM_ALL<Bfloat>,  &FROM_ALL<float>,    &FROM_ALL<double>};

// Two reals to a pair: the first operand is the upper half.
template <Format F, class Code>
Outcome convert_two(Warp& warp, const Instruction& at) {
  const uint32_t given = static_cast<uint32_t>(at.numbers[GIVEN]);
  const Round round = static_cast<Round>(at.numbers[ROUND]);
  const auto code = [&](float x, Round mode, uint32_t modifiers) {
    if ((modifiers & RELU) != 0 && x <= 0) x = 0;
    return encode<F>(x, mode, (modifiers & FINITE) != 0);
  };
  const float *high = warp.row<float>(at.rows[1]), *low = warp.row<float>(at.rows[2]);
  constexpr int BITS = 1 + F.exponent + F.mantissa;
  Code results[LANES];
  const auto fill = [&](Round mode, uint32_t modifiers) {
    for (int i = 0; i < LANES; ++i)
      results[i] = static_cast<Code>(code(high[i], mode, modifiers) << BITS | code(low[i], mode, modifiers));
  };
  if (round == Round::nearest && given == NEAREST) {
    fill(Round::nearest, NEAREST);
  } else {
    fill(round, given);
  }
  store(warp, at.rows[0], results);
  return Outcome::next;
}

// A pair to a pair, between halves and bytes.
template <Format TO, class ToCode, Format FROM, class FromCode>
Outcome convert_pair(Warp& warp, const Instruction& at) {
  constexpr int TO_BITS = 1 + TO.exponent + TO.mantissa, FROM_BITS = 1 + FROM.exponent + FROM.mantissa;
  const uint32_t given = static_cast<uint32_t>(at.numbers[GIVEN]);
  const FromCode* from = warp.row<FromCode>(at.rows[1]);
  ToCode results[LANES];
  for (int i = 0; i < LANES; ++i) {
    uint32_t both = 0;
    for (const int part : {1, 0}) {
      float x = decode<FROM>(from[i] >> (part * FROM_BITS) & ((1u << FROM_BITS) - 1));
      if ((given & RELU) != 0 && x <= 0) x = 0;
      both = both << TO_BITS | encode<TO>(x, Round::nearest, (given & FINITE) != 0);
    }
    results[i] = static_cast<ToCode>(both);
  }
  store(warp, at.rows[0], results);
  return Outcome::next;
}

Outcome convert_tf32(Warp& warp, const Instruction& at) {
  const float* from = warp.row<float>(at.rows[1]);
  uint32_t results[LANES];
  for (int i = 0; i < LANES; ++i) {
    const float x = (at.numbers[GIVEN] & RELU) != 0 && from[i] <= 0 ? 0.0f : from[i];
    const Round round = static_cast<Round>(at.numbers[ROUND]);
    results[i] = x == x ? encode<TF32>(x, round, (at.numbers[GIVEN] & FINITE) != 0) << 13 : 0x7fffffffu;
  }
  store(warp, at.rows[0], results);
  return Outcome::next;
}

struct Special {
  Step step;
  std::vector<uint32_t> widths;
  uint32_t modifiers;
};

const Special* special(const std::string& types) {
  using H = uint16_t;
  using W = uint32_t;
  constexpr uint32_t any = NEAREST | DIRECTED | RELU | FINITE;
  static const std::unordered_map<std::string, Special> all = {
      {"f16x2.f32", {convert_two<F16, W>, {4, 4, 4}, any}},
      {"bf16x2.f32", {convert_two<BF16, W>, {4, 4, 4}, any}},
      {"e4m3x2.f32", {convert_two<E4M3, H>, {2, 4, 4}, NEAREST | RELU | FINITE}},
      {"e5m2x2.f32", {convert_two<E5M2, H>, {2, 4, 4}, NEAREST | RELU | FINITE}},
      {"e4m3x2.f16x2", {convert_pair<E4M3, H, F16, W>, {2, 4}, NEAREST | RELU | FINITE}},
      {"e5m2x2.f16x2", {convert_pair<E5M2, H, F16, W>, {2, 4}, NEAREST | RELU | FINITE}},
      {"f16x2.e4m3x2", {convert_pair<F16, W, E4M3, H>, {4, 2}, NEAREST | RELU}},
      {"f16x2.e5m2x2", {convert_pair<F16, W, E5M2, H>, {4, 2}, NEAREST | RELU}},
      {"tf32.f32", {convert_tf32, {4, 4}, any | AWAY}},
  };
  const auto found = all.find(types);
  return found == all.end() ? nullptr : &found->second;
}

bool decode_special(const Special& found, const Modifiers& modifiers, const Statement& given, Build& build,
                    Instruction& to) {
  if ((modifiers.given & ~found.modifiers) != 0 || given.operands.size() != found.widths.size()) return false;
  if ((modifiers.given & ROUNDS) == 0 || modifiers.integral) return false;
  std::vector<Row> rows;
  for (size_t i = 0; i < found.widths.size(); ++i)
    rows.push_back(build.row(given.operands[i], found.widths[i]));
  finish(build, to, found.step, 1, std::move(rows), {modifiers.given, static_cast<int64_t>(modifiers.round)});
  return true;
}

// Whether a conversion rounds as it has to, and takes the other modifiers.
bool takes(const Modifiers& modifiers, size_t to, size_t from) {
  const bool to_real = to >= FIRST_REAL, from_real = from >= FIRST_REAL;
  const bool among_halves =
      WIDTHS[to] == 2 && WIDTHS[from] == 2 && to != from;  // each has what the other lacks
  const bool narrows = to_real && (!from_real || WIDTHS[to] < WIDTHS[from] || among_halves);
  const bool rounds = (modifiers.given & ROUNDS) != 0;
  if ((modifiers.given & (APPROXIMATE | AWAY)) != 0) return false;
  if (!to_real) return from_real ? modifiers.integral : (modifiers.given & ~SAT) == 0;
  return narrows ? rounds && !modifiers.integral : !rounds || (to == from && modifiers.integral);
}

bool decode_cvt(const Statement& given, Build& build, Instruction& to) {
  const size_t count = given.parts.size();
  if (count < 3) return false;
  const Modifiers modifiers = read_modifiers(given);
  const std::string &to_name = given.parts[count - 2], &from_name = given.parts[count - 1];
  given.has(to_name), given.has(from_name);
  if (const Special* found = special(to_name + '.' + from_name)) {
    return decode_special(*found, modifiers, given, build, to);
  }
  const auto index = [](const std::string& name) {
    return static_cast<size_t>(std::find(NAMES.begin(), NAMES.end(), name) - NAMES.begin());
  };
  const size_t to_kind = index(to_name), from_kind = index(from_name);
  if (to_kind == KINDS || from_kind == KINDS || given.operands.size() != 2) return false;
  if (!takes(modifiers, to_kind, from_kind)) return false;
  const auto width = [&](const Operand& operand, size_t kind) {
    const bool wider = operand.is == Operand::Is::reg && kind < FIRST_REAL;
    return wider ? std::max(build.width_of(operand), WIDTHS[kind]) : std::max(WIDTHS[kind], 2u);
  };
  const uint32_t to_width = width(given.operands[0], to_kind),
                 from_width = width(given.operands[1], from_kind);
  if (std::max(to_width, from_width) > 8) return false;
  const std::vector<Row> rows = {build.row(given.operands[0], to_width),
                                 build.row(given.operands[1], from_width)};
  finish(build, to, (*STEPS[to_kind])[from_kind], 1, rows,
         {modifiers.given, static_cast<int64_t>(modifiers.round), modifiers.integral, to_width, from_width});
  return true;
}

}  // namespace

void add_conversions(Decoders& decoders) { decoders["cvt"] = decode_cvt; }

}  // namespace gpu

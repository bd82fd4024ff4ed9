// Floating-point formats that C++ has no type for, and rounding to them.
#pragma once

#include <bit>
#include <cfenv>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace gpu {

enum class Round : uint8_t { nearest, zero, down, up, away };  // away: to nearest, ties away from zero

struct Format {
  int exponent, mantissa;  // bits
  bool infinite = true;    // false: all exponents are of numbers, and only the last code is a NaN

  constexpr int bias() const { return (1 << (exponent - 1)) - 1; }
  constexpr uint32_t infinity() const { return ((1u << exponent) - 1) << mantissa; }
  constexpr uint32_t nan() const { return infinity() | ((1u << mantissa) - 1); }
  constexpr uint32_t largest() const { return infinite ? infinity() - 1 : nan() - 1; }
  constexpr uint32_t sign() const { return 1u << (exponent + mantissa); }
};

constexpr Format F16{5, 10}, BF16{8, 7}, TF32{8, 10}, E5M2{5, 2}, E4M3{4, 3, false};

// The value of a code, exact.
template <Format F>
inline float decode(uint32_t code) {
  const uint32_t magnitude = code & (F.sign() - 1);
  const float scale = std::bit_cast<float>(static_cast<uint32_t>(127 + 127 - F.bias()) << 23);
  // A subnormal's code is a subnormal float's too, and the scale makes it right.
  uint32_t bits = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << (23 - F.mantissa)) * scale);
  if (F.infinite ? magnitude >= F.infinity() : magnitude == F.nan()) bits |= 0x7f800000;
  return std::bit_cast<float>(bits | (code & F.sign()) << (31 - F.exponent - F.mantissa));
}

// The code of a float or a double, rounded once. Beyond the largest number is infinity, as rounding to
// nearest has it and as the other modes have it on their side; with `finite`, the largest number.
template <Format F, class Real>
inline uint32_t encode(Real value, Round round, bool finite = false) {
  using Bits = std::conditional_t<sizeof(Real) == 8, uint64_t, uint32_t>;
  constexpr int FRACTION = std::numeric_limits<Real>::digits - 1, TOP = sizeof(Real) * 8 - 1;
  const Bits bits = std::bit_cast<Bits>(value), magnitude = bits & ~(Bits{1} << TOP);
  const bool negative = bits >> TOP;
  const int exponent = static_cast<int>(magnitude >> FRACTION);
  const Bits hidden = exponent != 0 ? Bits{1} << FRACTION : 0;
  const Bits significand = (magnitude & ((Bits{1} << FRACTION) - 1)) | hidden;
  const int scaled = (exponent != 0 ? exponent : 1) - std::numeric_limits<Real>::max_exponent + 1 + F.bias();
  const int field = scaled < 1 ? 1 : scaled;
  const int wanted = FRACTION - F.mantissa + (field - scaled);
  const int shift = wanted > TOP ? TOP : wanted;
  const Bits half = Bits{1} << (shift - 1), rest = (Bits{1} << shift) - 1;
  const Bits up = negative ? 0 : rest, down = negative ? rest : 0;
  const Bits added = round == Round::nearest ? half - 1 + (significand >> shift & 1)
                     : round == Round::away  ? half
                     : round == Round::up    ? up
                     : round == Round::down  ? down
                                             : 0;
  // A carry out of the mantissa makes the exponent larger by one, as does the hidden bit of a normal number.
  const Bits code = (static_cast<Bits>(field - 1) << F.mantissa) + ((significand + added) >> shift);
  const bool towards_zero =
      round == Round::zero || (round == Round::up && negative) || (round == Round::down && !negative);
  const bool infinite = exponent == 2 * std::numeric_limits<Real>::max_exponent - 1;
  const uint32_t beyond = finite || (towards_zero && !infinite) ? F.largest()
                          : F.infinite                          ? F.infinity()
                                                                : F.nan();
  const uint32_t found = code > F.largest() || infinite ? beyond : static_cast<uint32_t>(code);
  if (value != value) return F.nan();
  return found | (negative ? F.sign() : 0);
}

// Types of a register's content.
template <Format F>
struct Narrow {
  uint16_t code;
};
using Half = Narrow<F16>;
using Bfloat = Narrow<BF16>;

template <class T>
constexpr bool is_narrow = std::is_same_v<T, Half> || std::is_same_v<T, Bfloat>;
template <class T>
constexpr bool is_real = std::is_floating_point_v<T> || is_narrow<T>;

template <class T>
inline auto value_of(T x) {
  if constexpr (std::is_same_v<T, Half>) {
    return decode<F16>(x.code);
  } else if constexpr (std::is_same_v<T, Bfloat>) {
    return decode<BF16>(x.code);
  } else {
    return x;
  }
}

// NaNs that arithmetic makes; a float64's keeps its payload.
template <class T, class Real>
inline T real_of(Real x, Round round, bool finite = false) {
  if constexpr (std::is_same_v<T, Half>) {
    return {static_cast<uint16_t>(encode<F16>(x, round, finite))};
  } else if constexpr (std::is_same_v<T, Bfloat>) {
    return {static_cast<uint16_t>(encode<BF16>(x, round, finite))};
  } else if constexpr (std::is_same_v<T, float>) {
    return x == x ? static_cast<float>(x) : std::bit_cast<float>(0x7fffffffu);
  } else {
    return x;
  }
}

// Has the processor round in a mode while it lives. What it computes from and to is passed, so that the
// compiler keeps the computation in between.
class Rounding {
 public:
  Rounding(Round round, const void* from, void* to)
      : other_(round != Round::nearest && round != Round::away), from_(from), to_(to) {
    constexpr int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD, FE_TONEAREST};
    if (other_) std::fesetround(modes[static_cast<int>(round)]);
    fence();
  }
  ~Rounding() {
    fence();
    if (other_) std::fesetround(FE_TONEAREST);
  }
  Rounding(const Rounding&) = delete;

 private:
  void fence() const { asm volatile("" ::"r"(from_), "r"(to_) : "memory"); }

  bool other_;
  const void* from_;
  void* to_;
};

}  // namespace gpu

// Floating-point arithmetic: rounded once, in the mode that the opcode names.
#include <cmath>

#include "arithmetic.h"

namespace gpu {
namespace {

template <class T>
constexpr float LEAST_NORMAL = std::is_same_v<T, Half> ? 0x1p-14f : 0x1p-126f;

// A lane's values, as reals in which they are exact.
template <class T, class Real, int COUNT>
void load(const T* from, bool flush, Real* to) {
  for (int i = 0; i < COUNT; ++i) to[i] = value_of(from[i]);
  if (!flush) return;
  for (int i = 0; i < COUNT; ++i)
    if (std::abs(to[i]) < LEAST_NORMAL<T>) to[i] = std::copysign(Real{0}, to[i]);
}

template <class T, class Real, int COUNT>
void narrow(Real* from, uint32_t modifiers, T* to) {
  if ((modifiers & SAT) != 0)
    for (int i = 0; i < COUNT; ++i) from[i] = from[i] > 0 ? (from[i] < 1 ? from[i] : 1) : 0;
  if ((modifiers & RELU) != 0)
    for (int i = 0; i < COUNT; ++i) from[i] = from[i] <= 0 ? 0 : from[i];
  for (int i = 0; i < COUNT; ++i) to[i] = real_of<T>(from[i], Round::nearest);
  if ((modifiers & FTZ) == 0) return;
  for (int i = 0; i < COUNT; ++i) {
    const auto value = value_of(to[i]);
    if (std::abs(value) < LEAST_NORMAL<T>)
      to[i] = real_of<T>(std::copysign(value * 0, value), Round::nearest);
  }
}

// A function of reals on values of type T, `EACH` of them a lane.
template <class T, int EACH, class Real, class F, size_t... I>
Outcome compute_of(Warp& warp, const Instruction& at, std::index_sequence<I...>) {
  constexpr int COUNT = LANES * EACH;
  using Word = std::conditional_t<sizeof(T) * EACH == 8, uint64_t,
                                  std::conditional_t<sizeof(T) * EACH == 4, uint32_t, uint16_t>>;
  const uint32_t modifiers = static_cast<uint32_t>(at.numbers[0]);
  Real given[sizeof...(I)][COUNT], found[COUNT];
  (load<T, Real, COUNT>(warp.row<T>(at.rows[1 + I]), (modifiers & FTZ) != 0, given[I]), ...);
  {
    const Rounding rounding(static_cast<Round>(at.numbers[1]), given, found);
    for (int i = 0; i < COUNT; ++i) found[i] = F{}(given[I][i]...);
  }
  T results[COUNT];
  narrow<T, Real, COUNT>(found, modifiers, results);
  Word words[LANES];
  std::memcpy(words, results, sizeof words);
  store(warp, at.rows[0], words);
  return Outcome::next;
}

template <class T, int EACH, class Real, class F, int OPERANDS>
void define_real(Forms& forms, const std::string& opcode, uint32_t modifiers) {
  std::vector<uint32_t> widths(1 + OPERANDS, sizeof(T) * EACH);
  constexpr auto step = [](Warp& warp, const Instruction& at) {
    return compute_of<T, EACH, Real, F>(warp, at, std::make_index_sequence<OPERANDS>{});
  };
  forms[opcode] = {step, std::move(widths), modifiers};
}

// For float32 and float64 in their own arithmetic.
template <int OPERANDS, class F>
void define_wide(Forms& forms, const std::string& opcode, uint32_t modifiers, uint32_t only_f32, F) {
  define_real<float, 1, float, F, OPERANDS>(forms, opcode + ".f32", modifiers | only_f32);
  define_real<double, 1, double, F, OPERANDS>(forms, opcode + ".f64", modifiers);
}

// For the types of 16 bits and their pairs, in float64.
template <int OPERANDS, class F>
void define_narrow(Forms& forms, const std::string& opcode, uint32_t modifiers, uint32_t only_f16, F) {
  define_real<Half, 1, double, F, OPERANDS>(forms, opcode + ".f16", modifiers | only_f16);
  define_real<Half, 2, double, F, OPERANDS>(forms, opcode + ".f16x2", modifiers | only_f16);
  define_real<Bfloat, 1, double, F, OPERANDS>(forms, opcode + ".bf16", modifiers);
  define_real<Bfloat, 2, double, F, OPERANDS>(forms, opcode + ".bf16x2", modifiers);
}

template <int OPERANDS, class F>
void define_all(Forms& forms, const std::string& opcode, uint32_t wide, uint32_t narrow,
                uint32_t but_f64_and_bf16, F f) {
  define_wide<OPERANDS>(forms, opcode, wide, but_f64_and_bf16, f);
  define_narrow<OPERANDS>(forms, opcode, narrow, but_f64_and_bf16, f);
}

// a b + c, inexact results with an odd last bit, so that rounding it again gives what one rounding gives.
double multiply_add_to_odd(double a, double b, double c) {
  const double product = a * b, sum = product + c;
  const double part = sum - product, error = (product - (sum - part)) + (c - part);
  const uint64_t bits = std::bit_cast<uint64_t>(sum);
  if (!std::isfinite(sum) || error == 0 || (bits & 1) != 0) return sum;
  return std::bit_cast<double>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}

struct Maximum {
  template <class Real>
  Real operator()(Real a, Real b) const {
    if (a != a || b != b) return a != a ? b : a;
    return a > b || (a == b && !std::signbit(a)) ? a : b;
  }
};
struct Minimum {
  template <class Real>
  Real operator()(Real a, Real b) const {
    if (a != a || b != b) return a != a ? b : a;
    return a < b || (a == b && std::signbit(a)) ? a : b;
  }
};
template <class Best>
struct KeepsNan {
  template <class Real>
  Real operator()(Real a, Real b) const {
    return a != a ? a : b != b ? b : Best{}(a, b);
  }
};
template <class Best>
struct OfMagnitudes {
  template <class Real>
  Real operator()(Real a, Real b) const {
    const Real sign = std::signbit(a) != std::signbit(b) ? Real{-1} : Real{1};
    return std::copysign(Best{}(std::abs(a), std::abs(b)), sign);
  }
};

template <class Best>
void define_best(Forms& forms, const std::string& opcode) {
  define_wide<2>(forms, opcode, 0, FTZ, Best{});
  define_narrow<2>(forms, opcode, 0, FTZ, Best{});
  define_real<float, 1, float, KeepsNan<Best>, 2>(forms, opcode + ".NaN.f32", FTZ);
  define_narrow<2>(forms, opcode + ".NaN", 0, FTZ, KeepsNan<Best>{});
  define_real<float, 1, float, OfMagnitudes<Best>, 2>(forms, opcode + ".xorsign.abs.f32", FTZ);
  define_real<float, 1, float, OfMagnitudes<KeepsNan<Best>>, 2>(forms, opcode + ".NaN.xorsign.abs.f32", FTZ);
}

void define_sums(Forms& forms) {
  constexpr uint32_t any = NEAREST | DIRECTED;
  define_all<2>(forms, "add", any, NEAREST, FTZ | SAT, [](auto a, auto b) { return a + b; });
  define_all<2>(forms, "sub", any, NEAREST, FTZ | SAT, [](auto a, auto b) { return a - b; });
  define_all<2>(forms, "mul", any, NEAREST, FTZ | SAT, [](auto a, auto b) { return a * b; });
  for (const char* opcode : {"fma", "mad"})
    define_wide<3>(forms, opcode, any, FTZ | SAT, [](auto a, auto b, auto c) { return std::fma(a, b, c); });
  define_narrow<3>(forms, "fma", NEAREST | RELU, FTZ | SAT,
                   [](double a, double b, double c) { return multiply_add_to_odd(a, b, c); });
  define_all<1>(forms, "neg", 0, 0, FTZ, [](auto a) { return -a; });
  define_all<1>(forms, "abs", 0, 0, FTZ, [](auto a) { return std::abs(a); });
  define_best<Maximum>(forms, "max");
  define_best<Minimum>(forms, "min");
  define_wide<2>(forms, "div", any, FTZ | APPROXIMATE, [](auto a, auto b) { return a / b; });
  define_wide<1>(forms, "rcp", any, FTZ | APPROXIMATE, [](auto a) { return 1 / a; });
  define_wide<1>(forms, "sqrt", any, FTZ | APPROXIMATE, [](auto a) { return std::sqrt(a); });
}

template <class F>
void define_approximate(Forms& forms, const std::string& opcode, F) {
  define_real<float, 1, double, F, 1>(forms, opcode + ".f32", APPROXIMATE | FTZ);
}

// An approximation in float64 sees the upper 32 bits of its operand, gives those of its result, and flushes
// subnormal numbers: a first guess for Newton's iteration.
template <class F>
double guessed(double a, F f) {
  constexpr uint64_t upper = 0xffffffff00000000;
  const auto cut = [](double x) {
    const double kept = std::bit_cast<double>(std::bit_cast<uint64_t>(x) & upper);
    return std::fpclassify(kept) == FP_SUBNORMAL ? std::copysign(0.0, kept) : kept;
  };
  return cut(f(cut(a)));
}

// Approximations are those of float64, rounded: nearer than any that a GPU has.
void define_functions(Forms& forms) {
  const auto power = [](double a) { return std::exp2(a); };
  const auto tangent = [](double a) { return std::tanh(a); };
  define_approximate(forms, "ex2", power);
  define_approximate(forms, "tanh", tangent);
  define_narrow<1>(forms, "ex2", APPROXIMATE | FTZ, 0, power);
  define_narrow<1>(forms, "tanh", APPROXIMATE, 0, tangent);
  define_approximate(forms, "lg2", [](double a) { return std::log2(a); });
  define_approximate(forms, "sin", [](double a) { return std::sin(a); });
  define_approximate(forms, "cos", [](double a) { return std::cos(a); });
  define_approximate(forms, "rsqrt", [](double a) { return 1 / std::sqrt(a); });
  define_one<double>(forms, "rcp.approx.ftz.f64",
                     [](double a) { return guessed(a, [](double x) { return 1 / x; }); });
  define_one<double>(forms, "rsqrt.approx.ftz.f64",
                     [](double a) { return guessed(a, [](double x) { return 1 / std::sqrt(x); }); });
}

template <class T>
void define_tests(Forms& forms, const std::string& type) {
  define_one<T>(forms, "testp.finite." + type, [](T a) { return static_cast<bool>(std::isfinite(a)); });
  define_one<T>(forms, "testp.infinite." + type, [](T a) { return static_cast<bool>(std::isinf(a)); });
  define_one<T>(forms, "testp.number." + type, [](T a) { return a == a; });
  define_one<T>(forms, "testp.notanumber." + type, [](T a) { return a != a; });
  define_one<T>(forms, "testp.normal." + type, [](T a) { return static_cast<bool>(std::isnormal(a)); });
  define_one<T>(forms, "testp.subnormal." + type,
                [](T a) { return a != 0 && std::abs(a) < std::numeric_limits<T>::min(); });
  define_one<T, T>(forms, "copysign." + type, [](T a, T b) { return std::copysign(b, a); });
}

}  // namespace

void define_reals(Forms& forms) {
  define_sums(forms);
  define_functions(forms);
  define_tests<float>(forms, "f32");
  define_tests<double>(forms, "f64");
}

}  // namespace gpu

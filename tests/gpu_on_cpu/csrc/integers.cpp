// Integer arithmetic, bits and bytes.
#include <algorithm>
#include <limits>

#include "arithmetic.h"

namespace gpu {
namespace {

// Without a sign and at least 32 bits wide, where C++ lets everything wrap. A sign is extended.
template <class T>
constexpr auto bits(T x) {
  return static_cast<std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>>(x);
}

// The type of twice as many bits.
template <class T>
using Twice = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
template <class T>
constexpr uint32_t SIZE = 8 * sizeof(T);  // in bits

template <class T>
Twice<T> product(T a, T b) {
  return static_cast<Twice<T>>(a) * static_cast<Twice<T>>(b);
}

template <class T>
T high(T a, T b) {
  return static_cast<T>(product(a, b) >> SIZE<T>);
}

template <class T>
T saturated(Twice<T> x) {
  return static_cast<T>(
      std::clamp<Twice<T>>(x, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}

// Ones in the lowest `count` places.
template <class T>
T ones(uint32_t count) {
  return count >= SIZE<T> ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << count) - 1);
}

template <class T>
T divide(T a, T b, bool remainder) {
  if (b == 0) return static_cast<T>(~T{0});
  if (std::is_signed_v<T> && b == static_cast<T>(-1)) return remainder ? 0 : static_cast<T>(-bits(a));
  return static_cast<T>(remainder ? a % b : a / b);
}

template <class T>
uint32_t highest_bit(T x) {
  using U = std::make_unsigned_t<T>;
  const U found = static_cast<U>(std::is_signed_v<T> && x < 0 ? ~x : x);
  return static_cast<uint32_t>(std::bit_width(found)) - 1;
}

template <class T>
T extract(T a, uint32_t position, uint32_t length) {
  using U = std::make_unsigned_t<T>;
  position &= 255;
  length &= 255;
  const uint32_t there = position < SIZE<T> ? std::min<uint32_t>(length, SIZE<T> - position) : 0;
  const U from = static_cast<U>(a);
  const U found = there == 0 ? 0 : static_cast<U>(from >> position) & ones<U>(there);
  const uint32_t last = std::min<uint32_t>(position + length - 1, SIZE<T> - 1);
  const bool sign = std::is_signed_v<T> && length != 0 && (from >> last & 1) != 0;
  return static_cast<T>(sign ? found | static_cast<U>(~ones<U>(there)) : found);
}

template <class T>
T insert(T a, T b, uint32_t position, uint32_t length) {
  position &= 255;
  length &= 255;
  if (position >= SIZE<T>) return b;
  const T mask = static_cast<T>(ones<T>(length) << position);
  return (b & ~mask) | (static_cast<T>(a << position) & mask);
}

template <class T>
T reverse(T x) {
  T found = 0;
  for (uint32_t i = 0; i < SIZE<T>; ++i) found |= (x >> i & 1) << (SIZE<T> - 1 - i);
  return found;
}

uint32_t shift_pair(uint32_t low, uint32_t high, uint32_t by, bool left) {
  const uint64_t both = uint64_t{high} << 32 | low;
  return static_cast<uint32_t>(left ? both << by >> 32 : both >> by);
}

// Bytes of b:a by a selector of four nibbles; the fourth bit of one asks for copies of the byte's sign.
uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t nibble = selector >> (4 * i);
    const uint32_t byte = both >> (8 * (nibble & 7)) & 255;
    result |= ((nibble & 8) == 0 ? byte : byte & 128 ? 255 : 0) << (8 * i);
  }
  return result;
}

// The selector that a mode of prmt has for the last two bits of c.
constexpr uint32_t picked(uint32_t c, uint32_t zero, uint32_t one, uint32_t two, uint32_t three) {
  return c & 2 ? (c & 1 ? three : two) : c & 1 ? one : zero;
}

uint32_t logic(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {
    const uint32_t term = (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    result |= table >> i & 1 ? term : 0;
  }
  return result;
}

// Sum of the products of 8-bit elements, or of 16-bit elements and 8-bit ones from `start`.
template <class A, class B, uint32_t COUNT>
uint32_t dot(uint32_t a, uint32_t b, uint32_t sum, uint32_t start = 0) {
  for (uint32_t i = 0; i < COUNT; ++i) {
    sum += static_cast<uint32_t>(static_cast<A>(a >> (i * SIZE<A>))) *
           static_cast<uint32_t>(static_cast<B>(b >> ((start + i) * SIZE<B>)));
  }
  return sum;
}

template <class A8, class A16, class B>
void define_dots(Forms& forms, const std::string& types) {
  using W = uint32_t;
  define_one<W, W, W>(forms, "dp4a" + types, [](W a, W b, W c) { return dot<A8, B, 4>(a, b, c); });
  define_one<W, W, W>(forms, "dp2a.lo" + types, [](W a, W b, W c) { return dot<A16, B, 2>(a, b, c); });
  define_one<W, W, W>(forms, "dp2a.hi" + types, [](W a, W b, W c) { return dot<A16, B, 2>(a, b, c, 2); });
}

template <class All>
void define_sums(Forms& forms, All types) {
  define<It, It>(forms, "add", types, []<class T>(T a, T b) { return static_cast<T>(bits(a) + bits(b)); });
  define<It, It>(forms, "sub", types, []<class T>(T a, T b) { return static_cast<T>(bits(a) - bits(b)); });
  define<It, It>(forms, "mul.lo", types, []<class T>(T a, T b) { return static_cast<T>(bits(a) * bits(b)); });
  define<It, It>(forms, "mul.hi", types, []<class T>(T a, T b) { return high(a, b); });
  define<It, It, It>(forms, "mad.lo", types,
                     []<class T>(T a, T b, T c) { return static_cast<T>(bits(a) * bits(b) + bits(c)); });
  define<It, It, It>(forms, "mad.hi", types,
                     []<class T>(T a, T b, T c) { return static_cast<T>(bits(high(a, b)) + bits(c)); });
  define<It, It>(forms, "div", types, []<class T>(T a, T b) { return divide(a, b, false); });
  define<It, It>(forms, "rem", types, []<class T>(T a, T b) { return divide(a, b, true); });
  define<It, It>(forms, "min", types, []<class T>(T a, T b) { return a < b ? a : b; });
  define<It, It>(forms, "max", types, []<class T>(T a, T b) { return a < b ? b : a; });
  define_one<int32_t, int32_t>(forms, "min.relu.s32",
                               [](int32_t a, int32_t b) { return std::max(std::min(a, b), 0); });
  define_one<int32_t, int32_t>(forms, "max.relu.s32",
                               [](int32_t a, int32_t b) { return std::max({a, b, 0}); });
  define<It, It, It>(forms, "sad", types, []<class T>(T a, T b, T c) {
    return static_cast<T>(bits(c) + (a < b ? bits(b) - bits(a) : bits(a) - bits(b)));
  });
  define<It, uint32_t>(forms, "shr", types, []<class T>(T a, uint32_t by) {
    if (by >= SIZE<T>) return static_cast<T>(std::is_signed_v<T> && a < 0 ? -1 : 0);
    return static_cast<T>(a >> by);
  });
}

template <class... Narrow>
void define_wide(Forms& forms, Types<Narrow...> types) {
  define<It, It>(forms, "mul.wide", types, []<class T>(T a, T b) { return product(a, b); });
  const auto add = []<class T>(T a, T b, Twice<T> c) {
    return static_cast<Twice<T>>(bits(product(a, b)) + bits(c));
  };
  (define_one<Narrow, Narrow, Twice<Narrow>>(forms, "mad.wide." + name_of<Narrow>(types.letter), add), ...);
}

template <class... Wide>
void define_fields(Forms& forms, Types<Wide...> types) {
  define<It, uint32_t, uint32_t>(forms, "bfe", types,
                                 []<class T>(T a, uint32_t b, uint32_t c) { return extract(a, b, c); });
  define<It>(forms, "bfind", types, []<class T>(T a) { return highest_bit(a); });
  define<It>(forms, "bfind.shiftamt", types, []<class T>(T a) {
    const uint32_t found = highest_bit(a);
    return found == NONE ? found : SIZE<T> - 1 - found;
  });
}

void define_bits(Forms& forms) {
  define<It, It>(forms, "and", BITS, []<class T>(T a, T b) { return static_cast<T>(a & b); });
  define<It, It>(forms, "or", BITS, []<class T>(T a, T b) { return static_cast<T>(a | b); });
  define<It, It>(forms, "xor", BITS, []<class T>(T a, T b) { return static_cast<T>(a ^ b); });
  define<It>(forms, "not", BITS, []<class T>(T a) { return static_cast<T>(~a); });
  define<It>(forms, "cnot", BITS, []<class T>(T a) { return static_cast<T>(a == 0); });
  define<It, uint32_t>(forms, "shl", BITS, []<class T>(T a, uint32_t by) {
    return by >= SIZE<T> ? T{0} : static_cast<T>(bits(a) << by);
  });
  define<It, uint32_t>(forms, "shr", BITS, []<class T>(T a, uint32_t by) {
    return by >= SIZE<T> ? T{0} : static_cast<T>(a >> by);
  });
  constexpr Types<uint32_t, uint64_t> wide{"b"};
  define<It>(forms, "popc", wide, [](auto a) { return static_cast<uint32_t>(std::popcount(a)); });
  define<It>(forms, "clz", wide, [](auto a) { return static_cast<uint32_t>(std::countl_zero(a)); });
  define<It>(forms, "brev", wide, [](auto a) { return reverse(a); });
  define<It, It, uint32_t, uint32_t>(
      forms, "bfi", wide, []<class T>(T a, T b, uint32_t c, uint32_t d) { return insert(a, b, c, d); });
}

void define_words(Forms& forms) {
  using W = uint32_t;
  const auto three = [&](const char* opcode, auto f) { define_one<W, W, W>(forms, opcode, f); };
  three("shf.l.wrap.b32", [](W a, W b, W c) { return shift_pair(a, b, c & 31, true); });
  three("shf.r.wrap.b32", [](W a, W b, W c) { return shift_pair(a, b, c & 31, false); });
  three("shf.l.clamp.b32", [](W a, W b, W c) { return shift_pair(a, b, std::min(c, 32u), true); });
  three("shf.r.clamp.b32", [](W a, W b, W c) { return shift_pair(a, b, std::min(c, 32u), false); });
  three("prmt.b32", [](W a, W b, W c) { return permute(a, b, c); });
  three("prmt.b32.f4e",
        [](W a, W b, W c) { return permute(a, b, picked(c, 0x3210, 0x4321, 0x5432, 0x6543)); });
  three("prmt.b32.b4e",
        [](W a, W b, W c) { return permute(a, b, picked(c, 0x5670, 0x6701, 0x7012, 0x0123)); });
  three("prmt.b32.rc8",
        [](W a, W b, W c) { return permute(a, b, picked(c, 0x0000, 0x1111, 0x2222, 0x3333)); });
  three("prmt.b32.ecl",
        [](W a, W b, W c) { return permute(a, b, picked(c, 0x3210, 0x3211, 0x3222, 0x3333)); });
  three("prmt.b32.ecr",
        [](W a, W b, W c) { return permute(a, b, picked(c, 0x0000, 0x1110, 0x2210, 0x3210)); });
  three("prmt.b32.rc16",
        [](W a, W b, W c) { return permute(a, b, picked(c, 0x1010, 0x3232, 0x1010, 0x3232)); });
  define_one<W, W, W, W>(forms, "lop3.b32", [](W a, W b, W c, W d) { return logic(a, b, c, d); });
}

// What only the signed types have, or only those of 32 bits.
void define_signed(Forms& forms) {
  using S = int32_t;
  define<It>(forms, "neg", SIGNED, []<class T>(T a) { return static_cast<T>(-bits(a)); });
  define<It>(forms, "abs", SIGNED, []<class T>(T a) { return static_cast<T>(a < 0 ? -bits(a) : bits(a)); });
  define_one<S, S>(forms, "add.sat.s32", [](S a, S b) { return saturated<S>(int64_t{a} + b); });
  define_one<S, S>(forms, "sub.sat.s32", [](S a, S b) { return saturated<S>(int64_t{a} - b); });
  define_one<S, S, S>(forms, "mad.hi.sat.s32",
                      [](S a, S b, S c) { return saturated<S>(int64_t{high(a, b)} + c); });
}

}  // namespace

void define_integers(Forms& forms) {
  define_sums(forms, UNSIGNED);
  define_sums(forms, SIGNED);
  define_wide(forms, Types<uint16_t, uint32_t>{"u"});
  define_wide(forms, Types<int16_t, int32_t>{"s"});
  define_fields(forms, Types<uint32_t, uint64_t>{"u"});
  define_fields(forms, Types<int32_t, int64_t>{"s"});
  define_bits(forms);
  define_words(forms);
  define_signed(forms);
  define_dots<uint8_t, uint16_t, uint8_t>(forms, ".u32.u32");
  define_dots<uint8_t, uint16_t, int8_t>(forms, ".u32.s32");
  define_dots<int8_t, int16_t, uint8_t>(forms, ".s32.u32");
  define_dots<int8_t, int16_t, int8_t>(forms, ".s32.s32");
}

}  // namespace gpu

#include "product.h"

#include <bit>
#include <charconv>
#include <cstring>
#include <optional>

#include "formats.h"

namespace gpu {
namespace {

constexpr size_t STRETCH = 32;  // elements that a compiler can do side by side

template <class Bits, class Value>
void each(const void* from, size_t count, float* to, Value&& value) {
  for (size_t i = 0; i < count; i += STRETCH) {
    Bits bits[STRETCH];
    std::memcpy(bits, static_cast<const std::byte*>(from) + i * sizeof(Bits), sizeof bits);
    for (size_t j = 0; j < STRETCH; ++j) to[i + j] = value(bits[j]);
  }
}

template <Format F>
constexpr auto decoded = [](uint32_t code) { return decode<F>(code); };

// WIDTH columns of c, ROWS at a time: their sums are in registers, so many that none waits for another.
template <uint32_t ROWS, uint32_t WIDTH>
void multiply_columns(const Product& p, const float* a, const float* b, float* c) {
  using Line [[gnu::vector_size(WIDTH * sizeof(float))]] = float;
  for (uint32_t first = 0; first < p.m; first += ROWS) {
    Line sums[ROWS];
#pragma GCC unroll 8
    for (uint32_t i = 0; i < ROWS; ++i) std::memcpy(&sums[i], c + (first + i) * p.n, sizeof sums[i]);
    for (uint32_t k = 0; k < p.k; ++k) {
      Line line;
      std::memcpy(&line, b + k * p.n, sizeof line);
#pragma GCC unroll 8
      for (uint32_t i = 0; i < ROWS; ++i) sums[i] += a[(first + i) * p.k + k] * line;
    }
#pragma GCC unroll 8
    for (uint32_t i = 0; i < ROWS; ++i) std::memcpy(c + (first + i) * p.n, &sums[i], sizeof sums[i]);
  }
}

std::optional<Element> element_of(std::string_view name) {
  constexpr std::string_view names[] = {"f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8"};
  for (size_t i = 0; i < std::size(names); ++i)
    if (names[i] == name) return static_cast<Element>(i);
  return std::nullopt;
}

}  // namespace

bool read_shape(std::string_view text, Product* to) {
  const char *at = text.data(), *const end = at + text.size();
  const auto number = [&](char letter, uint32_t* value) {
    if (at == end || *at != letter) return false;
    const auto [next, error] = std::from_chars(at + 1, end, *value);
    at = next;
    return error == std::errc() && *value != 0;
  };
  return number('m', &to->m) && number('n', &to->n) && number('k', &to->k) && at == end;
}

bool read_types(std::string_view d, std::string_view a, std::string_view b, Product* to) {
  const auto a_is = element_of(a), b_is = element_of(b);
  if (!a_is || !b_is || !(d == "f32" || d == "f16" || d == "s32")) return false;
  to->a = *a_is;
  to->b = *b_is;
  to->sum = d == "f32" ? Sum::f32 : d == "f16" ? Sum::f16 : Sum::s32;
  if (is_integer(to->a) != (to->sum == Sum::s32)) return false;
  if (to->sum == Sum::f16 && (to->a == Element::bf16 || to->a == Element::tf32)) return false;
  // Elements of one byte may be of two types, as long as both are integers or neither is.
  if (bytes_of(to->a) == 1) return bytes_of(to->b) == 1 && is_integer(to->a) == is_integer(to->b);
  return to->a == to->b;
}

void widen(Element element, const void* from, size_t count, float* to) {
  switch (element) {
    case Element::f16:
      return each<uint16_t>(from, count, to, decoded<F16>);
    case Element::bf16:
      return each<uint16_t>(from, count, to, decoded<BF16>);
    case Element::tf32:
      return each<uint32_t>(from, count, to,
                            [](uint32_t bits) { return std::bit_cast<float>(bits & ~0x1fffu); });
    case Element::e4m3:
      return each<uint8_t>(from, count, to, decoded<E4M3>);
    case Element::e5m2:
      return each<uint8_t>(from, count, to, decoded<E5M2>);
    case Element::s8:
      return each<int8_t>(from, count, to, [](int8_t value) { return static_cast<float>(value); });
    case Element::u8:
      return each<uint8_t>(from, count, to, [](uint8_t value) { return static_cast<float>(value); });
  }
}

void multiply(const Product& product, const float* a, const float* b, float* c) {
  uint32_t at = 0;  // column
  for (; at + 16 <= product.n; at += 16) multiply_columns<8, 16>(product, a, b + at, c + at);
  for (; at < product.n; at += 8) multiply_columns<8, 8>(product, a, b + at, c + at);
}

}  // namespace gpu

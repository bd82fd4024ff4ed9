// Products of matrices as a warp makes them, in numbers of float32.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace gpu {

enum class Element : uint8_t { f16, bf16, tf32, e4m3, e5m2, s8, u8 };
enum class Sum : uint8_t { f32, f16, s32 };

// D = A B + C, of the 8 or 16 rows that one warp has.
struct Product {
  uint32_t m, n, k;
  Element a, b;
  Sum sum;
  bool saturates = false;  // .satfinite of s32
};

constexpr uint32_t bytes_of(Element element) {
  return element == Element::tf32 ? 4 : element <= Element::bf16 ? 2 : 1;
}
constexpr bool is_integer(Element element) { return element >= Element::s8; }

// m, n and k of a part of an opcode such as m16n8k16.
bool read_shape(std::string_view text, Product* to);
// The types of D, A and B by their names, and whether a multiplication has them with one another.
bool read_types(std::string_view d, std::string_view a, std::string_view b, Product* to);

// The values of elements that lie beside one another, a multiple of 32 of them. All are exact.
void widen(Element element, const void* from, size_t count, float* to);
// c += a b: m x k by k x n, each row by row, n a multiple of 8. Adds in the order of increasing k. Products
// are exact, and so are sums of the products of 8-bit integers.
void multiply(const Product& product, const float* a, const float* b, float* c);

}  // namespace gpu

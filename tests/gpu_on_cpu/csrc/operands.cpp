// Reads one operand of a statement.
#include <cctype>
#include <cstdlib>
#include <cstring>

#include "fault.h"
#include "kernel_build.h"

namespace gpu {
namespace {

template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

Operand vector_of(std::vector<Operand> parts) {
  Operand vector;
  vector.is = Operand::Is::vector;
  vector.parts = std::move(parts);
  return vector;
}

std::vector<Operand> read_parts(Reader& reader) {
  std::vector<Operand> parts;
  reader.expect("{");
  do {
    parts.push_back(read_operand(reader));
  } while (reader.take(","));
  reader.expect("}");
  return parts;
}

// 0f and 0d give a float's and a double's bits, all else with a point or an exponent is a double.
bool read_real(Reader& reader, Operand& to) {
  const bool negative = reader.is("-");
  const std::string text(reader.peek(negative).text);
  const bool hexadecimal = text.size() > 1 && text[0] == '0' && std::strchr("xXbB", text[1]) != nullptr;
  const bool exact = text.size() > 1 && text[0] == '0' && std::strchr("fFdD", text[1]) != nullptr;
  if (hexadecimal || (!exact && text.find_first_of(".eE") == std::string::npos)) return false;
  to.is = Operand::Is::real;
  to.is_float32 = exact && (text[1] == 'f' || text[1] == 'F');
  char* end = nullptr;
  to.bits = exact ? std::strtoull(text.c_str() + 2, &end, 16) : bits_of(std::strtod(text.c_str(), &end));
  if (*end != '\0' || (exact && text.size() != (to.is_float32 ? 10 : 18))) reader.fail_here("a number");
  if (negative) {
    reader.next();
    to.bits ^= to.is_float32 ? uint64_t{1} << 31 : uint64_t{1} << 63;
  }
  reader.next();
  return true;
}

int64_t read_offset(Reader& reader) {
  if (reader.is("+") && reader.is("-", 1)) reader.next();
  return reader.is("+") || reader.is("-") ? reader.integer() : 0;
}

Operand read_address(Reader& reader) {
  Operand address;
  address.is = Operand::Is::address;
  reader.expect("[");
  if (reader.at_number()) {
    address.offset = reader.integer();
  } else {
    address.name = reader.name();
    address.offset = read_offset(reader);
  }
  if (reader.take(",")) address.parts = read_parts(reader);
  reader.expect("]");
  return address;
}

Operand read_name(Reader& reader) {
  Operand operand;
  operand.name = reader.name();
  if (operand.name == "_") {
    operand.is = Operand::Is::sink;
  } else if (operand.name[0] == '%') {
    operand.is = Operand::Is::reg;
  } else if (operand.name == "WARP_SZ") {
    operand.is = Operand::Is::number;
    operand.bits = LANES;
  } else {
    operand.is = Operand::Is::symbol;
    operand.offset = read_offset(reader);
  }
  return operand;
}

}  // namespace

Operand read_operand(Reader& reader) {
  if (reader.is("{")) return vector_of(read_parts(reader));
  if (reader.is("[")) return read_address(reader);
  if (reader.at_number()) {
    Operand number;
    if (read_real(reader, number)) return number;
    number.is = Operand::Is::number;
    number.bits = static_cast<uint64_t>(reader.integer());
    return number;
  }
  const bool negated = reader.take("!");
  Operand operand = read_name(reader);
  operand.negated = negated;
  if (!reader.take("|")) return operand;
  return vector_of({operand, read_name(reader)});
}

}  // namespace gpu

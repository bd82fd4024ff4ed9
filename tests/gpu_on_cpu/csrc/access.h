// What decoders of instructions that touch memory share.
#pragma once

#include <cstdint>

#include "control.h"
#include "decode.h"
#include "memory.h"

namespace gpu {

// An address operand: a row of 32 or 64 bits a lane, and an offset.
struct Address {
  Row row = NONE;
  int64_t offset = 0;
  bool wide = true;

  uint64_t of(const Warp& warp, uint32_t lane) const {
    const uint64_t base = wide ? warp.row<uint64_t>(row)[lane] : warp.row<uint32_t>(row)[lane];
    return base + static_cast<uint64_t>(offset);
  }
};

struct Type {
  const char* name;
  uint32_t bytes;
  bool is_signed;
};

// An access as the opcode has it.
struct AccessForm {
  Space space = Space::generic;
  Order order = Order::weak;
  Scope scope = Scope::gpu;
  bool read_only = false;  // .nc
  bool hinted = false;     // a cache policy is the last operand
  uint32_t count = 1;      // elements
  const Type* type = nullptr;
  Address address;

  uint32_t bytes() const { return count * type->bytes; }
};

// Reads the parts that ld, st, atom and red have in common; false where a type is missing.
bool read_form(const Statement& given, AccessForm& form);
Address address_of(const Operand& operand, Build& build);
// The address of a lane, in a space that is no longer generic where that can be told; aligned to `bytes`.
uint64_t aligned_address(const Warp& warp, const Address& address, uint32_t bytes, uint32_t lane);
Access access_of(Warp& warp, const Instruction& at, const AccessForm& form);

}  // namespace gpu

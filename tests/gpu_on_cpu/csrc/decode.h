// What a decoder sees of a statement, and how it gets rows for its operands.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "program.h"

namespace gpu {

struct Operand {
  enum class Is : uint8_t { reg, number, real, symbol, address, vector, sink };
  Is is = Is::sink;
  std::string name;         // of a register (with %), a label or a variable; the base of an address
  bool negated = false;     // !%p
  uint64_t bits = 0;        // of a number; of a real: as a double (0d, plain) or as a float (0f)
  bool is_float32 = false;  // of a real: written as 0f...
  int64_t offset = 0;       // of an address, after the base
  std::vector<Operand>
      parts;  // of a vector {a, b}; of an address with coordinates [map, {x, y}]; of a|p: two
};

struct Statement {
  std::string opcode;              // whole: "ld.global.v4.b32"
  std::vector<std::string> parts;  // "ld", "global", "v4", "b32"; "::" stays within a part
  std::vector<Operand> operands;
  // Whether the opcode has a part, and then marks it as understood.
  bool has(std::string_view part) const;
  mutable std::vector<bool> understood;  // by part; the parser fails for parts that no decoder asked for
};

// Parser's state while one kernel is decoded.
class Build {
 public:
  virtual ~Build() = default;
  // Row of a register or a constant, `width` bytes a lane; a constant is converted to that (sign and all bits
  // of a number; a real to float32 or float64 by width). Fault where the register's declared width is
  // another.
  virtual Row row(const Operand& operand, uint32_t width) = 0;
  virtual Row predicate(
      const Operand& operand) = 0;  // !p is a row of its own made by the caller: see negated
  virtual uint32_t width_of(const Operand& reg) const = 0;  // declared; 0 for a predicate
  // A fresh row that only this instruction uses.
  virtual Row scratch(uint32_t width) = 0;
  // pc of a label; known only once the kernel was read: written to *to then.
  virtual void label(const std::string& name, int64_t* to) = 0;
  virtual const Variable* variable(const std::string& name) const = 0;  // nullptr where there is none
  // The base's row and offset of [base+offset], [variable+offset], [number]: for a variable the row holds its
  // offset in its space (params and shared memory), or its address (global and constant variables).
  virtual Row address(const Operand& operand, int64_t* offset) = 0;
  virtual const std::vector<std::string>* targets(const std::string& name) const = 0;  // of a .branchtargets
  virtual const std::string& target() const = 0;                                       // "sm_90a"
  // Storage that lives with the program.
  virtual const Row* keep(std::vector<Row> rows) = 0;
  virtual int64_t* keep(std::vector<int64_t> numbers) = 0;
  virtual const void* keep(std::shared_ptr<void> more) = 0;
};

// Fills in `to` (step, rows, row_count, results, numbers, more). False: this form is not known.
using Decoder = bool (*)(const Statement& given, Build& build, Instruction& to);

// Decoders by the first part of the opcode.
using Decoders = std::unordered_map<std::string, Decoder>;
void add_arithmetic(Decoders&);  // register to register
void add_memory(Decoders&);      // ld, st, atom, red, fence, membar, prefetch, cvta, isspacep, mapa
void add_copies(Decoders&);      // cp.async, cp.async.bulk, cp.async.bulk.tensor and their groups
void add_matrix(Decoders&);      // ldmatrix, stmatrix, movmatrix, mma
void add_wgmma(Decoders&);       // wgmma and its groups
void add_control(Decoders&);     // bra, brx, ret, exit, trap, bar, barrier, mbarrier, elect, vote, shfl, ...

}  // namespace gpu

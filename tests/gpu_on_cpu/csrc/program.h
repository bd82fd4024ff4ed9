// A kernel as it is executed: its instructions, each with the function that performs it and the rows of
// registers that it takes. `parse.cpp` makes it from PTX.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace gpu {

struct Warp;
struct Instruction;

constexpr int LANES = 32;
using Mask = uint32_t;  // a bit for each lane of a warp
constexpr Mask ALL = 0xffffffffu;
constexpr uint32_t NONE = 0xffffffffu;

enum class Outcome : uint8_t {
  next,    // the lanes go on with the next instruction
  jumped,  // the instruction said itself where they go on
  waits,   // not possible yet: the same instruction again once something has changed
  polled,  // next, and what it saw may change: a loop around it need not run until something does
};

// Performs an instruction for the lanes of `warp.active` (those whose guard holds; never empty, but for
// instructions that set `unguarded`).
using Step = Outcome (*)(Warp& warp, const Instruction& at);

// An operand that is a register or a constant is a row of a warp's frame: 32 lanes beside one another, 2, 4,
// 8 or 16 bytes each (.b8 takes 2); a predicate's row is one Mask. Constants have rows that nobody writes, so
// that a step never asks what an operand is.
using Row = uint32_t;  // offset in bytes in the frame

struct Instruction {
  Step step = nullptr;
  Row guard = NONE;  // row of the predicate that guards it
  bool guard_negated = false;
  const Row* rows = nullptr;  // operands in the order of PTX, vectors flattened, "_" as NONE
  uint32_t row_count = 0;
  uint32_t results = 0;              // so many of the rows are written, the first ones
  const int64_t* numbers = nullptr;  // what its decoder noted: sizes, offsets, modes
  const void* more = nullptr;        // the same, where numbers do not do; lives as long as the program
  uint32_t pc = 0;
  uint32_t file = 0, line = 0;  // of the source (.loc); 0 where there is none
  uint32_t ptx_line = 0;
  std::string_view text;  // the statement, as written
};

struct Variable {  // a parameter, or a variable of the module or a kernel
  enum class Space : uint8_t { param, shared, global, constant, local };
  std::string name;
  Space space;
  uint64_t offset = 0;  // in its space; of global and constant variables, the host's address
  uint64_t bytes = 0;   // 0: .extern .shared, as large as the launch says
  uint32_t align = 1;
  std::vector<std::byte> initial;  // of global and constant variables
};

struct Constant {
  Row row;
  uint32_t width;  // bytes a lane; 0 for a predicate
  uint64_t bits;
};

// Special registers, all of 32 bits; `start.cpp` has their values in this order.
enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  smid,
  nsmid,
  clusterid_x,
  nclusterid_x,
  cluster_ctaid_x,
  cluster_ctarank,
  cluster_nctarank,
  lanemask_eq,
  lanemask_lt,
  lanemask_le,
  lanemask_gt,
  lanemask_ge,
  dynamic_smem_size,
  total_smem_size
};

struct SpecialRow {  // a special register that the kernel reads
  Special which;
  Row row;
};

struct Kernel {
  std::string name;
  std::vector<Instruction> instructions;
  std::vector<Variable> params;  // offsets in the buffer of arguments
  uint32_t param_bytes = 0;
  std::vector<Variable> shared, local;  // static shared memory; the depot
  uint32_t shared_bytes = 0, local_bytes = 0;
  uint32_t frame_bytes = 0;  // of all rows: registers, constants and special registers
  std::vector<Constant> constants;
  std::vector<SpecialRow> specials;
  uint32_t max_threads = 0;       // .maxntid / .reqntid, as a product; 0 where not said
  bool threads_required = false;  // .reqntid
  uint32_t min_blocks = 0, max_registers = 0;
};

struct Program {
  std::string text;
  std::string target;              // "sm_90a"
  std::vector<std::string> files;  // by number in .loc
  std::vector<Kernel> kernels;
  std::vector<Variable> globals;             // .global and .const variables of the module
  std::vector<std::shared_ptr<void>> owned;  // what `Instruction::rows`, `numbers` and `more` point into
};

// Parses a module; Fault{Kind::unknown} with the opcode, the kernel and the source line where something is
// not modelled: all of a module is decoded before any of it runs.
std::unique_ptr<Program> parse(std::string text);

}  // namespace gpu

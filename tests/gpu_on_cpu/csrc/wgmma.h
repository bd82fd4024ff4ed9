// Products of matrices by warpgroups, which are performed later than they are issued.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "machine.h"
#include "product.h"

namespace gpu {

// What a wgmma.mma_async is: its `Instruction::more`. Its rows: accumulators, A or its descriptor, the
// descriptor of B, the predicate of scale-d.
struct Wgmma {
  Product product;  // of one warp
  bool a_shared, a_k_major = true, b_k_major = true;
  bool negated;         // the product, by one of imm-scale-a and imm-scale-b
  bool unless = false;  // scale-d is negated
  // Its accumulators and registers of A: ranges of the frame.
  std::vector<std::pair<Row, Row>> accumulators, a;
};

// Of an instruction, or nullptr where it is another one.
const Wgmma* wgmma_of(const Instruction& at);

// By pc: whether an instruction other than mma_async touches registers that some mma_async of the kernel
// takes.
std::vector<uint8_t> touches_wgmma(const Kernel& kernel);
// Before such an instruction: Fault{Kind::in_flight} where an operation that was not waited for has the
// registers. Notes that a wgmma.fence has to come before an mma_async takes them.
void check_in_flight(Warp& warp, const Instruction& at);
// The same for an mma_async that is about to be issued, whose registers are in flight from then on.
void check_issue(Warp& warp, const Instruction& at, const Wgmma& plan);
void note_in_flight(Warp& warp, const Instruction& at, const Wgmma& plan);

}  // namespace gpu

// h_t = g_t * h_{t-1} + x_t over (sequence, step, channel): plain data that the op boundary passes to
// kernels.
//
// Lanes are floats (or 16-bit numbers): a complex channel is two adjacent lanes, its real and imaginary part.
// Channels are contiguous in every operand.
#pragma once

#include "common/scalar.h"

namespace resformer {

constexpr int64_t kScanBlock = 256;  // steps of one call of a kernel
constexpr int64_t kScanPad = 16;     // floats that may be read after the last of a row of float32

// A tensor by strides. data is null where an input is absent (read as zeros) or an output is not wanted.
struct ScanRows {
  void* data = nullptr;
  int64_t sequence = 0, step = 0;
};

// Steps in the order of the kernel: rows row, row + direction, ... of one sequence.
struct ScanPiece {
  int64_t sequence, row, direction, steps;
};

struct ScanForward {
  DType dtype;  // of tokens and states
  DType gates_dtype;
  bool is_complex;  // float32 then
  bool stream;      // states are written with non-temporal stores
  ScanRows tokens, gates, states;
  const float* constant_gates;  // one padded row for all steps; null: `gates` has a row for each step
};

struct ScanBackward {
  DType dtype;  // of the states and of every gradient but the gates'
  DType gates_dtype;
  bool is_complex;
  bool stream;                   // as above, of d_tokens and d_gates
  ScanRows grad, gates, states;  // states: read where the gates' gradient is wanted
  ScanRows d_tokens, d_gates;
  const float* constant_gates;
};

// State between pieces. `carry` is read and written: padded lanes.
struct ScanState {
  float* carry;
  // Backward: the state before the last step visited, padded, where no row of `states` has it; else null.
  const float* before = nullptr;
  double* sums = nullptr;  // of the gradient of constant gates, added to; null: not wanted
};

// Kernels built for one instruction set. Each serves lanes [begin, end) of a piece's rows; begin is a
// multiple of kScanPad.
struct ScanKernels {
  void (*forward)(const ScanForward&, const ScanPiece&, int64_t begin, int64_t end, const ScanState&);
  void (*backward)(const ScanBackward&, const ScanPiece&, int64_t begin, int64_t end, const ScanState&);
};

}  // namespace resformer

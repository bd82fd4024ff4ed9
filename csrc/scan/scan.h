// h_t = g_t * h_{t-1} + x_t over (sequence, step, channel): the plain data that the op boundary hands to a
// kernel.
//
// Rows are counted in floats (or 16-bit numbers): a complex channel is two neighbours, its real and its
// imaginary part. Channels are contiguous in every operand.
#pragma once

#include "common/scalar.h"

namespace resformer {

constexpr int64_t kScanBlock = 256;  // steps between two places where the state is looked at from outside
constexpr int64_t kScanPad = 16;     // floats that may be read after the last of a row of float32

// A tensor by strides. data is null where there is none: what is read is zero, what is written is not wanted.
struct ScanRows {
  void* data = nullptr;
  int64_t sequence = 0, step = 0;
};

// Steps in the order in which a kernel visits them: rows row, row + direction, ... of one sequence.
struct ScanPiece {
  int64_t sequence, row, direction, steps;
};

struct ScanForward {
  DType dtype;  // of tokens and states
  DType gates_dtype;
  bool is_complex;  // then both are float32
  bool stream;      // the states are too many to stay in a cache
  ScanRows tokens, gates, states;
  const float* constant_gates;  // a row for all steps, padded; null: `gates` has one a step
};

struct ScanBackward {
  DType dtype;  // of the states and of every gradient but the gates'
  DType gates_dtype;
  bool is_complex;
  bool stream;
  ScanRows grad, gates, states;  // states: read where the gates' gradient is wanted
  ScanRows d_tokens, d_gates;
  const float* constant_gates;
};

// What changes from one piece to the next. `carry` goes in and out: lanes, padded.
struct ScanState {
  float* carry;
  // Backward: the state before the last step visited, padded, where no row of `states` has it; else null.
  const float* before = nullptr;
  double* sums = nullptr;  // of the gradient of constant gates, added to; null: not wanted
};

// A build of the kernels for one instruction set. Each visits lanes [begin, end) of a piece's rows; begin
// is a multiple of kScanPad.
struct ScanKernels {
  void (*forward)(const ScanForward&, const ScanPiece&, int64_t begin, int64_t end, const ScanState&);
  void (*backward)(const ScanBackward&, const ScanPiece&, int64_t begin, int64_t end, const ScanState&);
};

}  // namespace resformer

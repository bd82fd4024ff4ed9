// h_t = (1 - a) h_{t-1} + a f(W h_{t-1} + W_in u_t + b), and its adjoint: the plain data that the op boundary
// hands to a kernel.
//
// The states of many segments of time are stepped together, one row each. A row's arithmetic depends on that
// row alone: every unit sums its inputs and then its neighbours in the order of k, in one chain of fused
// multiply-adds, for any number of rows and any split of the units over threads. A segment that starts from
// the same bits therefore has the same bits, and chunks of time can be compared.
#pragma once

#include "common/scalar.h"

namespace resformer {

enum class Activation : int32_t { tanh = 0, relu = 1, identity = 2, sigmoid = 3, softplus = 4 };

// entries: W has one entry per row, as a diagonal or a permutation has.
enum class WeightKind : int32_t { groups = 0, entries = 1, csr = 2 };

constexpr int64_t kPadding = 16;    // units of a group are padded to a multiple of this
constexpr int64_t kCheckEvery = 8;  // steps between comparisons with a stored trajectory

// A dense matrix as it was given: element (group, unit, k) lies at the sum of the strides.
struct ReservoirMatrix {
  DType dtype;  // float32 or bfloat16
  const void* data;
  int64_t group_stride, unit_stride, k_stride;
  int64_t k;  // length of the sum
};

// Units as kernels see them: each group padded to a multiple of kPadding.
struct ReservoirLayout {
  int64_t groups, size, padded;

  int64_t units() const { return groups * size; }
  int64_t width() const { return groups * padded; }
};

// Everything that the steps of all rows share. Vectors are padded.
struct ReservoirStep {
  ReservoirLayout layout;
  WeightKind kind;
  DType weight_dtype;
  Activation activation;
  bool adjoint;               // h' = retain h + (drive + W (gain h)): the gains are read, f is the identity
  int64_t inputs;             // columns of W_in; 0: `ReservoirRow::inputs` are the drive itself
  const void* weight;         // packed
  const float* input_weight;  // packed
  const int64_t* rows;        // csr
  const int32_t* columns;     // csr by entry, entries by unit
  const uint8_t* runs;        // entries: for each kPadding units, whether their columns are consecutive
  bool independent;           // no unit reads another and no trajectories are compared
  const float* retain;        // 1 - a
  const float* amplitude;     // a; 1 in the adjoint
  const float* bias;          // null: none
  int64_t input_step, state_step;  // elements from one step to the next; negative back in time
  float tolerance;                 // of comparisons; 0 asks for the same bits
  bool relative;                   // to the larger of 1 and the state
};

// One segment of time.
struct ReservoirRow {
  const float* inputs;  // of its first step
  const float* gain;    // adjoint: of its first step, at state_step from one to the next
  float* states;        // of its first step; if `compare`, they hold the stored trajectory
  float* slot[2];       // width: the state; the first holds the start, and the steps alternate
  float* sent[2];       // width: the factor of W, gain * state; slot itself but in the adjoint
  int64_t steps;
  bool compare;
  int64_t ran;   // result: steps taken
  bool met;      // result: stopped where it met the stored trajectory
  float growth;  // result: largest factor by which the distance from the stored trajectory grew again
};

static inline int64_t panels_of(const ReservoirLayout& layout, int64_t panel) {
  return layout.groups * ((layout.padded + panel - 1) / panel);
}

// Threads that step the same rows, each some panels of units, and wait for one another.
struct ReservoirTeam {
  int64_t parts;
  int64_t panels;
  alignas(64) int64_t arrived;
  alignas(64) int64_t generation;
};

// One member of a team, and its memory.
struct ReservoirMember {
  ReservoirTeam* team;
  int64_t begin, end;  // its parts
  float* scratch;      // rows * two panels; for csr also the states of rows, rounded up to kPadding
  float* differ;       // shared by the team: (2, parts, rows, 2), largest difference and largest state
  float* nearest;      // rows: the least distance from what is stored so far
  int32_t* active;     // rows
};

// A build of the kernels for one instruction set.
struct ReservoirKernels {
  int64_t panel;  // most units of one panel, all of one group
  // Panel p as rows of k, at out + (padded units before it) * k; `widen`: to float32, else in its own dtype.
  void (*pack)(const ReservoirMatrix&, const ReservoirLayout&, int64_t p, bool widen, void* out);
  void (*run)(const ReservoirStep&, ReservoirRow* rows, int64_t count, ReservoirMember& member);
};

}  // namespace resformer

// The recurrence on a GPU, step after step: the work of one block.
//
// It keeps its units' rows of W in shared memory for all steps, and the states that they read. In a step it
// waits for the states of other blocks' units, sums, and sends its own (`reservoir_blocks.h` has the split,
// `together_cuda.h` the exchange of numbers between blocks). Words of two steps are enough: a block that has
// received every unit of step t knows that no block still waits for step t - 1, for each had received all of
// it before it could send.
#pragma once

#include "common/together_cuda.h"
#include "reservoir/reservoir_blocks.h"

namespace resformer {
namespace {

constexpr int kThreads = 256, kLanes = 32;
constexpr int kAtOnce = 8;  // words that a thread loads before it waits for any

struct Recurrence {
  BlockPlan plan;
  ReservoirMatrix weight;        // in the adjoint transposed, by its strides
  ReservoirMatrix input_weight;  // data null: the inputs are the drive itself
  int64_t sequences, time;
  const int32_t* offsets;  // null: all sequences have `time` steps
  int64_t total;           // rows of the states
  const float *inputs, *gains, *leak, *bias, *start;
  int64_t input_batch, input_step, leak_stride, bias_stride;
  Activation activation;
  float *states, *final_state;
  double* info;
  uint64_t* words;  // (2, sequences, units): states sent, of even and odd steps

  RESFORMER_INLINE int64_t units() const { return plan.groups * plan.size; }

  // Within the inputs, whatever the offsets hold.
  RESFORMER_INLINE int64_t begin(int64_t s) const {
    if (offsets == nullptr) return s * time;
    const int64_t found = offsets[s];
    return found < 0 ? 0 : found > total ? total : found;
  }
  RESFORMER_INLINE int64_t steps(int64_t s) const {
    if (offsets == nullptr) return time;
    const int64_t found = begin(s + 1) - begin(s);
    return found < 0 ? 0 : found;
  }
  RESFORMER_INLINE BlockSpan span(int64_t s) const {
    const int64_t row = begin(s);
    return {row, offsets == nullptr ? s * input_batch : row * input_step, steps(s)};
  }
  // The place of the recurrence's step t in its sequence: the adjoint goes back in time.
  RESFORMER_INLINE int64_t place(const BlockSpan& span, int64_t t) const {
    return gains == nullptr ? t : span.steps - 1 - t;
  }
  RESFORMER_INLINE uint64_t* word(int64_t t, int64_t s, int64_t unit) const {
    return words + ((t & 1) * sequences + s) * units() + unit;
  }
};

template <class E>
struct alignas(kVector * sizeof(E)) Vector {
  E at[kVector];
};

// The share of a block, and its shared memory.
template <class E>
struct Block {
  int64_t first_sequence, first;  // unit
  int sequences, own;             // units
  int within;                     // place of the first unit in its group
  int each;                       // units of one group in this block
  int most, hears;                // sequences of a team; units whose states a block reads, padded
  int padded, padded_inputs;
  float *heard, *inputs, *in_rows;
  E* rows;
  BlockSpan* spans;
  float *state, *drive, *gain, *leak, *bias;

  __device__ float* heard_at(uint32_t t, int s) const { return heard + ((t & 1) * most + s) * hears; }
  __device__ float* inputs_at(uint32_t t, int s) const {
    return inputs + ((t & 1) * most + s) * padded_inputs;
  }
  // Offset into `drive` and `gain`.
  __device__ int own_at(uint32_t t, int s) const { return ((t & 1) * most + s) * own; }
};

template <class E>
__device__ Block<E> block_of(const Recurrence& r) {
  const BlockPlan& p = r.plan;
  const int64_t team = blockIdx.x / p.members, member = blockIdx.x % p.members;
  Block<E> b{};
  b.first_sequence = team * p.sequences;
  b.sequences = static_cast<int>(min(p.sequences, max(r.sequences - b.first_sequence, int64_t{0})));
  if (p.split > 1) {
    b.within = static_cast<int>(member % p.split * p.each);
    b.first = member / p.split * p.size + b.within;
    b.own = static_cast<int>(min(p.each, p.size - b.within));
    b.each = b.own;
  } else {
    b.first = member * p.own();
    b.own = static_cast<int>(min(p.own(), r.units() - b.first));
    b.each = static_cast<int>(p.size);
  }
  b.most = static_cast<int>(p.sequences);
  b.hears = static_cast<int>(p.heard());
  b.padded = static_cast<int>(p.padded);
  b.padded_inputs = static_cast<int>(p.padded_inputs);
  const BlockMemory m = memory_of(p);
  unsigned char* memory = block_memory();
  const auto floats = [&](int64_t at) { return reinterpret_cast<float*>(memory + at); };
  b.heard = floats(m.heard);
  b.inputs = floats(m.inputs);
  b.in_rows = floats(m.in_rows);
  b.rows = reinterpret_cast<E*>(memory + m.rows);
  b.spans = reinterpret_cast<BlockSpan*>(memory + m.spans);
  b.state = floats(m.state);
  b.drive = floats(m.drive);
  b.gain = floats(m.gain);
  b.leak = floats(m.leak);
  b.bias = floats(m.bias);
  return b;
}

// Rows of a matrix, read once in the order in which they are stored.
template <class From, class To>
__device__ void copy_rows(const ReservoirMatrix& m, int64_t size, int64_t first, int count, int padded,
                          To* rows) {
  const From* data = static_cast<const From*>(m.data);
  const bool by_unit = m.unit_stride < m.k_stride;
  const int columns = static_cast<int>(m.k), in_group = static_cast<int>(first % size);
  data += first / size * m.group_stride;
  for (int i = threadIdx.x; i < count * columns; i += blockDim.x) {
    const int row = by_unit ? i % count : i / columns, k = by_unit ? i / count : i % columns;
    const int unit = in_group + row, group = unit / static_cast<int>(size);
    const int64_t at = group * m.group_stride + unit % static_cast<int>(size) * m.unit_stride;
    const From value = data[at + k * m.k_stride];
    if constexpr (sizeof(From) == sizeof(To)) {
      rows[row * padded + k] = value;
    } else {
      rows[row * padded + k] = to_float(value);
    }
  }
}

template <class E>
__device__ void copy_weights(const Recurrence& r, const Block<E>& b) {
  const BlockPlan& p = r.plan;
  copy_rows<E>(r.weight, p.size, b.first, b.own, b.padded, b.rows);
  const ReservoirMatrix& in = r.input_weight;
  if (in.data != nullptr && in.dtype == DType::bfloat16) {
    copy_rows<bf16>(in, r.units(), b.first, b.own, b.padded_inputs, b.in_rows);
  } else if (in.data != nullptr) {
    copy_rows<float>(in, r.units(), b.first, b.own, b.padded_inputs, b.in_rows);
  }
  for (int unit = threadIdx.x; unit < b.own; unit += blockDim.x) {
    b.leak[unit] = r.leak[(b.first + unit) * r.leak_stride];
    b.bias[unit] = r.bias == nullptr ? 0.0f : r.bias[(b.first + unit) * r.bias_stride];
  }
}

template <class E>
__device__ void copy_starts(const Recurrence& r, const Block<E>& b) {
  const BlockPlan& p = r.plan;
  for (int s = threadIdx.x; s < b.sequences; s += blockDim.x) b.spans[s] = r.span(b.first_sequence + s);
  if (r.start == nullptr) return;
  const int size = static_cast<int>(p.size), all = p.split > 1 ? size : b.own;
  for (int i = threadIdx.x; i < b.sequences * all; i += blockDim.x) {
    const int s = i / all, unit = i % all, mine = unit - b.within;
    const float h = r.start[(b.first_sequence + s) * r.units() + b.first - b.within + unit];
    b.heard_at(0, s)[unit / size * b.padded + unit % size] = h;
    if (mine >= 0 && mine < b.own) b.state[s * b.own + mine] = h;
  }
}

// Results that no step writes: rows of no sequence, final states of sequences without steps, the info.
template <class E>
__device__ void write_the_rest(const Recurrence& r, const Block<E>& b) {
  const int64_t units = r.units();
  for (int64_t i = threadIdx.x; r.final_state != nullptr && i < b.sequences * b.own; i += blockDim.x) {
    const int64_t s = b.first_sequence + i / b.own, at = s * units + b.first + i % b.own;
    if (r.steps(s) == 0) r.final_state[at] = r.start == nullptr ? 0.0f : r.start[at];
  }
  if (b.first_sequence > 0) return;
  const int64_t used = r.offsets == nullptr ? r.total : r.begin(r.sequences);
  for (int64_t i = used * b.own + threadIdx.x; i < r.total * b.own; i += blockDim.x) {
    r.states[i / b.own * units + b.first + i % b.own] = 0.0f;
  }
  if (b.first > 0 || threadIdx.x > 0) return;
  int64_t filled = 0;
  for (int64_t s = 0; s < r.sequences; ++s) filled += r.steps(s) > 0 ? 1 : 0;
  const double found[5] = {static_cast<double>(filled), filled > 0 ? 1.0 : 0.0, 0.0, 1.0, 1.0};
  for (int i = 0; i < 5; ++i) r.info[i] = found[i];
}

// Starts the asynchronous copies of step t's inputs, drive and gains.
template <class E>
__device__ __forceinline__ void fetch(const Recurrence& r, const Block<E>& b, uint32_t t) {
  const int inputs = static_cast<int>(r.plan.inputs);
  for (int i = threadIdx.x; i < b.sequences * inputs; i += blockDim.x) {
    const int s = i / inputs, k = i % inputs;
    const BlockSpan& span = b.spans[s];
    if (t >= span.steps) continue;
    copy_async(b.inputs_at(t, s) + k, r.inputs + span.input + r.place(span, t) * r.input_step + k);
  }
  if (inputs > 0) return;  // an adjoint has no W_in
  for (int i = threadIdx.x; i < b.sequences * b.own; i += blockDim.x) {
    const int s = i / b.own, unit = i % b.own, to = b.own_at(t, s) + unit;
    const BlockSpan& span = b.spans[s];
    if (t >= span.steps) continue;
    const int64_t place = r.place(span, t), from = b.first + unit;
    copy_async(b.drive + to, r.inputs + span.input + place * r.input_step + from);
    if (r.gains != nullptr) copy_async(b.gain + to, r.gains + (span.row + place) * r.units() + from);
  }
}

// Waits for the states that the other parts of the group sent in step t - 1.
template <class E>
__device__ __forceinline__ void hear(const Recurrence& r, const Block<E>& b, uint32_t t) {
  const int others = static_cast<int>(r.plan.size) - b.own, count = others * b.sequences;
  const uint64_t* words = r.word(t - 1, b.first_sequence, b.first - b.within);
  for (int base = threadIdx.x; base < count; base += kAtOnce * blockDim.x) {
    const uint64_t* from[kAtOnce];
    uint64_t word[kAtOnce];
    float* to[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = base + j * blockDim.x, s = i / others, k = i % others;
      const int unit = k < b.within ? k : k + b.own;
      const bool sent = i < count && t < b.spans[s].steps;
      from[j] = sent ? words + s * r.units() + unit : nullptr;
      to[j] = b.heard_at(t, s) + unit;
    }
    // All loads are issued before the first wait.
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) word[j] = from[j] == nullptr ? 0 : peek(from[j]);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (from[j] == nullptr) continue;
      while (step_of(word[j]) != t) {
        look_again();
        word[j] = peek(from[j]);
      }
      *to[j] = value_of(word[j]);
    }
  }
}

__device__ __forceinline__ float activate(Activation activation, float z) {
  if (activation == Activation::tanh) return tanhf(z);
  if (activation == Activation::sigmoid || activation == Activation::softplus) {
    const float below = expf(-fabsf(z)), part = z < 0.0f ? below : 1.0f;
    if (activation == Activation::sigmoid) return part / (1.0f + below);
    return (z < 0.0f ? 0.0f : z) + log1pf(below);
  }
  // A NaN stays.
  return activation == Activation::relu && z < 0.0f ? 0.0f : z;
}

// The unit's next state in the block's sequence s, once W and W_in are summed. `place`: of the unit among
// those whose states the block reads.
template <class E>
__device__ __forceinline__ void finish(const Recurrence& r, const Block<E>& b, uint32_t t, int s, int unit,
                                       int place, float z) {
  const BlockSpan& span = b.spans[s];
  const int mine = s * b.own + unit, now = b.own_at(t, s) + unit;
  if (r.plan.inputs == 0) z += b.drive[now];
  z += b.bias[unit];
  const float leak = b.leak[unit];
  const float fresh = r.gains == nullptr ? leak * activate(r.activation, z) : z;
  const float h = fmaf(1.0f - leak, b.state[mine], fresh);
  const float sent = r.gains == nullptr ? h : b.gain[now] * h;
  const int64_t sequence = b.first_sequence + s, at = b.first + unit;
  const bool last = t + 1 == span.steps;
  if (r.plan.split > 1 && !last) post(r.word(t, sequence, at), t + 1, sent);
  b.state[mine] = h;
  b.heard_at(t + 1, s)[place] = sent;
  r.states[(span.row + r.place(span, t)) * r.units() + at] = h;
  if (last && r.final_state != nullptr) r.final_state[sequence * r.units() + at] = h;
}

// Lane l takes vectors l, l + 32, ... in order: a sum has the same bits in every tile.
template <class E, int kUnits, int kColumns>
__device__ __forceinline__ void add_products(const E* const (&rows)[kUnits],
                                             const float* const (&columns)[kColumns], int padded, int lane,
                                             float (&sum)[kUnits * kColumns]) {
  for (int k = lane * static_cast<int>(kVector); k < padded; k += kLanes * static_cast<int>(kVector)) {
    Vector<float> h[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) h[c] = *reinterpret_cast<const Vector<float>*>(columns[c] + k);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const Vector<E> w = *reinterpret_cast<const Vector<E>*>(rows[u] + k);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float weight = to_float(w.at[i]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          sum[u * kColumns + c] = fmaf(weight, h[c].at[i], sum[u * kColumns + c]);
        }
      }
    }
  }
}

// Adds the lanes' sums in pairs. Lane l returns sum number l * kCount / 32: while a lane holds several, each
// exchange gives half of them away.
template <int kCount>
__device__ __forceinline__ float add_lanes(float (&sum)[kCount], int lane) {
  int left = kCount;
#pragma unroll
  for (int width = kLanes / 2; width > 0; width /= 2) {
    if (left == 1) {
      sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], width);
      continue;
    }
    left /= 2;
    const bool upper = (lane & width) != 0;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= left) continue;
      const float given = upper ? sum[i] : sum[i + left];
      const float kept = upper ? sum[i + left] : sum[i];
      sum[i] = kept + __shfl_xor_sync(0xffffffffu, given, width);
    }
  }
  return sum[0];
}

// All of the block's units in step t, one tile per warp.
template <class E, int kUnits, int kColumns>
__device__ __forceinline__ void sum_units(const Recurrence& r, const Block<E>& b, uint32_t t) {
  constexpr int kCount = kUnits * kColumns;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const int groups = b.own / b.each, tiles = (b.each + kUnits - 1) / kUnits;
  const int across = (b.sequences + kColumns - 1) / kColumns;
  for (int item = warp; item < groups * tiles * across; item += warps) {
    const int column = item % across * kColumns;
    const int unit = item / across % tiles * kUnits, group = item / across / tiles;
    float sum[kCount] = {};
    const E* rows[kUnits];
    const float *in_rows[kUnits], *columns[kColumns], *in_columns[kColumns];
    bool any = false;
    // Tiles past the last unit and sequence repeat these.
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int row = group * b.each + min(unit + u, b.each - 1);
      rows[u] = b.rows + row * b.padded;
      in_rows[u] = b.in_rows + row * b.padded_inputs;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int s = min(column + c, b.sequences - 1);
      any = any || t < b.spans[s].steps;
      columns[c] = b.heard_at(t, s) + group * b.padded;
      in_columns[c] = b.inputs_at(t, s);
    }
    if (!any) continue;
    add_products<float, kUnits, kColumns>(in_rows, in_columns, b.padded_inputs, lane, sum);
    add_products<E, kUnits, kColumns>(rows, columns, b.padded, lane, sum);
    const float z = add_lanes(sum, lane);
    const int number = lane * kCount / kLanes, s = column + number % kColumns;
    const int of = unit + number / kColumns;
    if (lane % (kLanes / kCount) == 0 && of < b.each && s < b.sequences && t < b.spans[s].steps) {
      finish(r, b, t, s, group * b.each + of, group * b.padded + b.within + of, z);
    }
  }
}

template <class E, int kUnits, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) recurrence_kernel(const __grid_constant__ Recurrence r) {
  const Block<E> b = block_of<E>(r);
  // Zeros where vectors are padded, and for states of step 0 that are not given.
  uint32_t* memory = reinterpret_cast<uint32_t*>(block_memory());
  for (int64_t i = threadIdx.x; i < memory_of(r.plan).end / 4; i += blockDim.x) memory[i] = 0;
  __syncthreads();
  copy_weights(r, b);
  copy_starts(r, b);
  write_the_rest(r, b);
  __syncthreads();
  int64_t longest = 0;
  for (int s = 0; s < b.sequences; ++s) longest = max(longest, b.spans[s].steps);
  if (longest > 0) fetch(r, b, 0);
  for (uint32_t t = 0; t < longest; ++t) {
    if (r.plan.split > 1 && t > 0) hear(r, b, t);
    copies_done();
    // One barrier per step: the memory that a step writes was last read in the step before.
    __syncthreads();
    if (t + 1 < longest) fetch(r, b, t + 1);
    sum_units<E, kUnits, kColumns>(r, b, t);
  }
}

}  // namespace
}  // namespace resformer

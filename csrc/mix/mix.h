// out = sum_i c_i V_i over (batch, time, heads, dim): plain data that the op boundary passes to kernels.
//
// A source is a tensor of that shape, or rows of a table selected by (batch, time). Packed tensors have
// batch 1. dim is contiguous in every source.
#pragma once

#include "common/coefficients.h"

namespace resformer {

struct MixShape {
  int64_t batch, time, heads, dim;

  RESFORMER_INLINE int64_t rows() const { return batch * time; }
};

struct MixSource {
  const void* data =
      nullptr;  // null: only the coefficient is given (backward without a coefficient gradient)
  DType dtype = DType::float32;
  int64_t stride[3] = {0, 0, 0};        // batch, time, head; of a table: row, unused, head
  const int64_t* table_rows = nullptr;  // (batch * time) rows of the table `data`; null: data is no table
  Coefficient coefficient{nullptr, DType::float32, 1.0f, {0, 0, 0, 0}};

  // Offset of (b, t, h, 0); row = b * time + t.
  RESFORMER_INLINE int64_t offset(int64_t b, int64_t t, int64_t row, int64_t h) const {
    const int64_t start = table_rows ? table_rows[row] * stride[0] : b * stride[0] + t * stride[1];
    return start + h * stride[2];
  }
};

// Long rows cost less per element: (heads, dim) becomes one axis where every operand allows it.
static RESFORMER_INLINE bool heads_join(const MixShape& shape, const MixSource& source) {
  const Coefficient& c = source.coefficient;
  const bool data = source.data == nullptr || source.stride[2] == shape.dim;
  return data && (c.data == nullptr || c.stride[2] == shape.dim * c.stride[3]);
}

static RESFORMER_INLINE bool heads_join(const MixShape& shape, const MixSource* sources, int64_t count) {
  bool join = shape.heads > 1 && shape.dim > 1;
  for (int64_t i = 0; i < count; ++i) join = join && heads_join(shape, sources[i]);
  return join;
}

static RESFORMER_INLINE MixShape with_heads_joined(const MixShape& shape) {
  return {shape.batch, shape.time, 1, shape.heads * shape.dim};
}

struct MixForward {
  DType dtype;  // of out
  MixShape shape;
  const MixSource* sources;
  int64_t count;
  void* out;            // contiguous
  bool stream = false;  // with non-temporal stores
};

// Axes along which a coefficient differs.
struct MixKept {
  bool batch = false, time = false, head = false, dim = false;
};

// How the sum over the axes that a coefficient broadcasts along is split. The split depends on shapes alone,
// so the bits do not depend on the number of threads.
enum class MixReduction : int32_t {
  none,   // each row (b, t) owns its entries: written directly
  batch,  // a time owns its entries, summed over the batch
  time,   // blocks of rows own float64 partial sums, which are added in order
};

static RESFORMER_INLINE MixReduction reduction_of(const MixKept& kept, const MixShape& shape) {
  if (!kept.time && shape.time > 1) return MixReduction::time;
  if (kept.batch || shape.batch == 1) return MixReduction::none;
  return kept.time ? MixReduction::batch : MixReduction::time;
}

// Blocks of rows: at least `least` rows each and about `most` blocks. `batches` is 1 where a block may span
// several sequences.
struct MixBlocks {
  int64_t batches = 1, rows = 0, block = 1, per_batch = 0;

  static RESFORMER_INLINE MixBlocks split(const MixShape& shape, bool within_batch, int64_t least,
                                          int64_t most) {
    MixBlocks b;
    b.batches = within_batch ? shape.batch : 1;
    b.rows = shape.rows() / b.batches;
    const int64_t fair = (shape.rows() + most - 1) / most;
    b.block = least > fair ? least : fair;
    b.per_batch = (b.rows + b.block - 1) / b.block;
    return b;
  }

  RESFORMER_INLINE int64_t count() const { return batches * per_batch; }
  RESFORMER_INLINE int64_t begin(int64_t i) const { return i / per_batch * rows + i % per_batch * block; }
  RESFORMER_INLINE int64_t end(int64_t i) const {
    const int64_t full = begin(i) + block, last = (i / per_batch + 1) * rows;
    return full < last ? full : last;
  }
};

struct MixSourceGradient {
  void* value = nullptr;        // dV_i = c_i * grad, contiguous; null: not wanted
  void* coefficient = nullptr;  // (rows or blocks, heads kept, dims kept); null: not wanted
  DType coefficient_dtype = DType::float32;
  MixReduction reduction = MixReduction::none;
  bool keeps_head = false, keeps_dim = false;
  int64_t width = 0;        // heads kept * dims kept
  int64_t accumulator = 0;  // offset of its float64 row sums in a thread's scratch

  RESFORMER_INLINE bool elementwise(const MixShape& shape) const {
    return reduction != MixReduction::time && width == shape.heads * shape.dim;
  }
};

struct MixBackward {
  DType dtype;  // of grad and of every dV_i
  MixShape shape;
  MixSource grad;  // its coefficient is not read
  const MixSource* sources;
  const MixSourceGradient* gradients;
  int64_t count;
  bool stream = false;  // dV_i are written with non-temporal stores
};

// dTable[id] = sum of gate * grad over the positions that hold id.
struct MixScatter {
  DType dtype;  // of grad
  MixShape shape;
  MixSource grad;  // its coefficient is the gate
  // Positions sorted by id and then by position; those of segment s are order[starts[s]] .. order[starts[s +
  // 1] - 1].
  const int64_t* order;
  const int64_t* starts;
  const int64_t* targets;  // the row of `out` that segment s fills
  int64_t segments;
  DType out_dtype;
  void* out;  // (rows, heads, dim), contiguous
};

// Kernels built for one instruction set. Ranges are those that parallel_for gives to one thread.
struct MixKernels {
  void (*forward)(const MixForward&, int64_t row_begin, int64_t row_end);
  void (*backward)(const MixBackward&, int64_t row_begin, int64_t row_end, int64_t block,
                   double* accumulators);
  // Segments and heads of one task.
  void (*scatter)(const MixScatter&, int64_t segment_begin, int64_t segment_end, int64_t head_begin,
                  int64_t head_end);
};

}  // namespace resformer

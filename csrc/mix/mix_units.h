// Splits the mix and its gradient into units of work for a GPU.
//
// A unit is a few groups of rows, a range of heads and a range of elements of each row; 1 to 32 lanes share
// its elements, a vector each. A group holds the rows that one entry of a coefficient's gradient (or one
// partial sum of it) adds up; one row where nothing is summed over rows. The split depends on shapes alone,
// so the bits of a gradient do not depend on the GPU.
//
// Plain arithmetic, run by the CUDA kernels and, in a test, on a CPU.
#pragma once

#include "mix/mix.h"

namespace resformer {

constexpr int kUnitThreads = 256;       // per block
constexpr int64_t kUnitLanes = 131072;  // enough to keep any GPU busy
constexpr int64_t kUnitBlocks = 2048;   // most partial sums of one entry
constexpr int64_t kRowsOfUnit = 4;      // where rows are not summed: amortises the unit's index arithmetic

struct MixRows {
  int64_t begin, count, step;
};

struct MixUnit {
  int64_t group_begin, group_end, head_begin, head_end, dim_begin, dim_end;
};

struct MixUnits {
  MixReduction reduction = MixReduction::none;
  MixBlocks blocks;  // the groups, with reduction `time`
  int64_t groups = 0, groups_each = 1;
  int64_t head_units = 1, heads_each = 1;
  int64_t tiles = 1, tile = 0;  // tiles per row, elements per tile
  int32_t lane_bits = 0;

  RESFORMER_INLINE int64_t lanes() const { return int64_t{1} << lane_bits; }
  RESFORMER_INLINE int64_t count() const {
    return (groups + groups_each - 1) / groups_each * head_units * tiles;
  }

  RESFORMER_INLINE MixUnit at(int64_t unit, const MixShape& shape) const {
    const int64_t tile_index = tiles == 1 ? 0 : unit % tiles, rest = tiles == 1 ? unit : unit / tiles;
    const int64_t head = head_units == 1 ? 0 : rest % head_units;
    const int64_t group = (head_units == 1 ? rest : rest / head_units) * groups_each;
    const int64_t group_end = group + groups_each, dim_end = (tile_index + 1) * tile;
    return {group,
            group_end < groups ? group_end : groups,
            head * heads_each,
            (head + 1) * heads_each,
            tile_index * tile,
            dim_end < shape.dim ? dim_end : shape.dim};
  }

  RESFORMER_INLINE MixRows rows(int64_t group, const MixShape& shape) const {
    if (reduction == MixReduction::none) return {group, 1, 1};
    if (reduction == MixReduction::batch) return {group, shape.batch, shape.time};
    const int64_t begin = blocks.begin(group);
    return {begin, blocks.end(group) - begin, 1};
  }
};

// `summed`: the gradient of a coefficient that differs along `kept` is wanted. `vector`: elements per lane.
static RESFORMER_INLINE MixUnits split_units(const MixShape& shape, const MixKept& kept, bool summed,
                                             int64_t vector) {
  MixUnits u;
  const int64_t vectors = (shape.dim + vector - 1) / vector;
  while (u.lanes() < vectors && u.lane_bits < 5) ++u.lane_bits;
  const int64_t step = u.lanes() * vector;
  const bool over_heads = summed && !kept.head, over_dims = summed && !kept.dim;
  u.heads_each = over_heads ? shape.heads : 1;
  u.head_units = shape.heads / u.heads_each;
  u.tile = over_dims ? shape.dim : step;
  u.tiles = over_dims ? 1 : (shape.dim + step - 1) / step;
  u.groups = shape.rows();
  u.groups_each = kRowsOfUnit;
  if (!summed) return u;
  u.reduction = reduction_of(kept, shape);
  if (u.reduction == MixReduction::none) return u;
  u.groups_each = 1;
  u.groups = shape.time;
  if (u.reduction == MixReduction::batch) return u;
  const int64_t fair = kUnitLanes / (u.lanes() * u.head_units * u.tiles);
  const int64_t most = fair < 1 ? 1 : (fair < kUnitBlocks ? fair : kUnitBlocks);
  // A block with a sum for every element of a row writes float64: with 8 rows that traffic would show.
  u.blocks = MixBlocks::split(shape, kept.batch, kept.dim ? 32 : 8, most);
  u.groups = u.blocks.count();
  return u;
}

// One source's share of the gradient.
struct MixPart {
  MixShape shape;
  MixSource grad, source;
  MixSourceGradient gradient;
  MixUnits units;
  bool wide_coefficient = false;

  // Index of the sum over a group's rows; h and d count where they are kept.
  RESFORMER_INLINE int64_t slot(int64_t group, int64_t h, int64_t d) const {
    const int64_t dims = gradient.keeps_dim ? shape.dim : 1;
    return group * gradient.width + (gradient.keeps_head ? h * dims : 0) + (gradient.keeps_dim ? d : 0);
  }

  RESFORMER_INLINE void store_sum(int64_t at, double sum) const {
    if (gradient.reduction == MixReduction::time) {
      static_cast<double*>(gradient.coefficient)[at] = sum;
    } else {
      store_as(gradient.coefficient_dtype, gradient.coefficient, at, sum);
    }
  }
};

// Partial sums of a coefficient's gradient: (groups, parts, width).
struct MixSum {
  const double* partials;
  int64_t groups, parts, width;
  DType dtype;
  void* out;

  RESFORMER_INLINE int64_t entries() const { return groups * width; }

  // log2 of the entries per block of threads; its other threads share the parts of each entry.
  RESFORMER_INLINE int entry_bits() const {
    int bits = 0;
    while (bits < 5 && (int64_t{1} << bits) < entries()) ++bits;
    return bits;
  }
};

static RESFORMER_INLINE MixSum sum_of(const MixPart& part, const double* partials, DType dtype, void* out) {
  const MixBlocks& blocks = part.units.blocks;
  return {partials, blocks.batches, blocks.per_batch, part.gradient.width, dtype, out};
}

static RESFORMER_INLINE bool multiple_of(const void* pointer, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// Whether every row of `source` starts at a multiple of 16 bytes and has a multiple of 16 bytes.
static RESFORMER_INLINE bool reads_vectors(const MixShape& shape, const MixSource& source, int64_t vector) {
  if (shape.dim % vector != 0) return false;
  if (source.data == nullptr) return true;
  return multiple_of(source.data, 16) && (shape.batch == 1 || source.stride[0] % vector == 0) &&
         (shape.time == 1 || source.stride[1] % vector == 0) &&
         (shape.heads == 1 || source.stride[2] % vector == 0);
}

// Whether a row's coefficients differ by element and can be read as vectors.
static RESFORMER_INLINE bool reads_vectors(const Coefficient& c) {
  const int64_t vector = c.dtype == DType::float32 ? 4 : 8;
  bool fits = c.data != nullptr && c.stride[3] == 1 && multiple_of(c.data, 16);
  for (int axis = 0; axis < 3; ++axis) fits = fits && c.stride[axis] % vector == 0;
  return fits;
}

struct MixOperand {
  MixSource source;
  bool wide_coefficient;
};

static RESFORMER_INLINE MixOperand operand_of(const MixSource& source) {
  return {source, reads_vectors(source.coefficient)};
}

struct MixForwardPlan {
  MixShape shape;
  MixUnits units;
  bool vectors;
};

// `vector`: elements of 16 bytes.
static RESFORMER_INLINE MixForwardPlan plan_forward(MixShape shape, const MixSource* sources, int64_t count,
                                                    int64_t vector) {
  if (heads_join(shape, sources, count)) shape = with_heads_joined(shape);
  bool vectors = true;
  for (int64_t i = 0; i < count; ++i) vectors = vectors && reads_vectors(shape, sources[i], vector);
  return {shape, split_units(shape, {}, false, vectors ? vector : 1), vectors};
}

// One source's share of the gradient, without output pointers. `summed`: the gradient of its coefficient,
// which differs along `kept`, is wanted.
static RESFORMER_INLINE MixPart plan_backward(MixShape shape, const MixSource& grad, const MixSource& source,
                                              const MixKept& kept, bool summed, int64_t vector,
                                              bool* vectors) {
  const MixSource operands[] = {grad, source};
  MixPart p;
  p.gradient.keeps_head = kept.head;
  p.gradient.keeps_dim = kept.dim;
  p.gradient.width = (kept.head ? shape.heads : 1) * (kept.dim ? shape.dim : 1);
  const bool alike = !summed || kept.head == kept.dim;
  if (alike && heads_join(shape, operands, 2)) shape = with_heads_joined(shape);
  *vectors = reads_vectors(shape, grad, vector) && reads_vectors(shape, source, vector);
  p.shape = shape;
  p.grad = grad;
  p.source = source;
  p.wide_coefficient = reads_vectors(source.coefficient);
  p.units = split_units(shape, kept, summed, *vectors ? vector : 1);
  p.gradient.reduction = p.units.reduction;
  return p;
}

}  // namespace resformer

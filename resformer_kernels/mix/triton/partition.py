"""The split of a mix's gradient over programs. Plain arithmetic on shapes: the bits of a
gradient do not depend on the GPU."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.specialise import Stride
from resformer_kernels.mix.triton.tiles import Shape, Size, size_of, tiles_of


class Differs(NamedTuple):
    """Axes of V along which a coefficient differs."""

    batch: bool
    time: bool
    head: bool
    dim: bool


class Split(NamedTuple):
    """How the kernel's rows and columns are split. Where ALL_* holds, a program loops over these;
    otherwise they are in the grid."""

    sequences: int
    """Sequences of the batch, or one of all rows; no tile spans two."""
    rows: int
    """Rows per sequence."""
    window: Stride
    """Columns per window: all, or those of one head."""
    windows: int
    row_tiles: int
    column_tiles: int
    """Tiles per window."""
    OVER_ROWS: tl.constexpr
    """Whether a tile's rows share one (partial) sum."""
    OVER_COLUMNS: tl.constexpr
    """Whether a tile's columns do."""
    ALL_SEQUENCES: tl.constexpr
    ALL_WINDOWS: tl.constexpr
    ALL_COLUMNS: tl.constexpr


class Partition(NamedTuple):
    """The split of one source's gradient, or of several whose coefficients differ alike."""

    size: Size
    split: Split
    programs: int
    """Programs per source."""
    parts: int
    """Partial sums of an entry; 0: sums are the entries themselves."""
    sum_width: int
    """Entries of the coefficient's gradient per row, or per sequence."""
    strides: tuple[int, int, int, int]
    """Strides of the (partial) sums: sequence, row (or row tile), window, column tile."""


def differs_along(coefficient: Tensor) -> Differs:
    """The axes along which a tensor of three or four axes differs."""
    return Differs(*(size > 1 for size in (1, *coefficient.shape)[-4:]))


def partition(shape: Shape, differs: Differs | None) -> Partition:
    """The partition for a coefficient that differs along these axes; None where its gradient is not
    wanted.

    Rows that one entry sums over are split into tiles with partial sums. The sums over the columns
    of a row, and over the batch at one time, stay in one program.
    """
    differs = differs or Differs(True, True, True, True)
    by_head = differs.head != differs.dim
    windows, window = (shape.heads, shape.dim) if by_head else (1, shape.width)
    over_rows = not differs.time and (shape.time > 1 or (not differs.batch and shape.batch > 1))
    over_batch = not over_rows and not differs.batch and shape.batch > 1
    separate = over_batch or (over_rows and differs.batch)
    sequences, rows = (shape.batch, shape.time) if separate else (1, shape.rows)
    if over_rows and differs.dim:
        # Every column has a float64 sum: with few rows that traffic would show.
        size = size_of(rows, window, widest=64, tallest=64)
    else:
        size = size_of(rows, window)
    row_tiles, column_tiles = tiles_of(rows, size.rows), tiles_of(window, size.columns)
    dims = shape.dim if differs.dim else 1
    sum_width = (shape.heads if differs.head else 1) * dims
    if over_rows:
        # (sequences, parts, sum_width): tiles whose entries coincide are parts of these.
        tile_parts = 1 if differs.dim else column_tiles
        parts = tile_parts * (1 if differs.head or not by_head else windows)
        loops = (False, False, False)
        strides = (
            row_tiles * parts * sum_width,
            parts * sum_width,
            dims if differs.head else tile_parts * sum_width,
            size.columns if differs.dim else sum_width,
        )
        parts *= row_tiles
    else:
        parts = 0
        loops = (over_batch, by_head and not differs.head, not differs.dim)
        strides = (
            *(0, sum_width, dims if differs.head else 0),
            size.columns if differs.dim else 0,
        )
    programs = row_tiles
    for count, looped in zip((sequences, windows, column_tiles), loops, strict=True):
        programs *= 1 if looped else count
    flags = (tl.constexpr(flag) for flag in (over_rows, not differs.dim, *loops))
    split = Split(sequences, rows, window, windows, row_tiles, column_tiles, *flags)
    return Partition(size, split, programs, parts, sum_width, strides)

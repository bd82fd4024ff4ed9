"""How the Triton kernels of the mixing ops cut their work. Plain arithmetic on shapes: the bits of
a gradient do not depend on the GPU."""

from __future__ import annotations

from typing import NamedTuple

_ELEMENTS = 4096
"""Of a tile: two to four loads of 16 bytes in flight for each thread of four warps."""


class Shape(NamedTuple):
    """V's; packed tensors have batch 1."""

    batch: int
    time: int
    heads: int
    dim: int

    @property
    def rows(self) -> int:
        """One for each (batch, time)."""
        return self.batch * self.time

    @property
    def width(self) -> int:
        """Of a row: heads and head_dim are one axis."""
        return self.heads * self.dim


class Tile(NamedTuple):
    """Rows and columns of a program, powers of two."""

    rows: int
    columns: int


class Backward(NamedTuple):
    """The cut of the gradient with respect to one source, or to several that are alike."""

    tile: Tile
    sequences: int
    """Those of the batch, or one of all rows; a tile does not run over the end of one."""
    rows: int
    """Of a sequence."""
    window: int
    """Columns of a window: all, or those of one head."""
    windows: int
    row_tiles: int
    column_tiles: int
    """Of a window."""
    over_rows: bool
    """A tile's rows have one sum together, a partial one."""
    over_columns: bool
    loops: tuple[bool, bool, bool]
    """Whether a program goes over all sequences, windows, column tiles."""
    parts: int
    """Partial sums of an entry."""
    sum_width: int
    """Entries of the coefficient's gradient for one row, or one sequence."""
    strides: tuple[int, int, int, int]
    """Of the (partial) sums: sequence, row (or row tile), window, column tile."""

    def programs(self) -> int:
        """Of one source."""
        counts = (self.sequences, self.windows, self.column_tiles)
        programs = self.row_tiles
        for count, looped in zip(counts, self.loops, strict=True):
            programs *= 1 if looped else count
        return programs


def tiles_of(size: int, tile: int) -> int:
    """How many tiles cover `size`."""
    return -(-size // tile)


def _power_of_two(size: int) -> int:
    return 1 << (max(1, size) - 1).bit_length()


def tile_of(time: int, width: int, widest: int = 1024, tallest: int = _ELEMENTS) -> Tile:
    """Rows as whole as possible: neighbouring columns are neighbours in memory."""
    columns = min(_power_of_two(width), widest)
    return Tile(min(_power_of_two(time), tallest, max(1, _ELEMENTS // columns)), columns)


def cut(shape: Shape, kept: tuple[bool, bool, bool, bool] | None) -> Backward:
    """`kept`: along which axes of V the coefficient differs; None where its gradient is not wanted.

    Rows that one entry sums over are cut into tiles with partial sums; what an entry sums over
    within a row, or over the batch at one time, one program adds up.
    """
    keeps_batch, keeps_time, keeps_head, keeps_dim = kept or (True, True, True, True)
    by_head = keeps_head != keeps_dim
    windows, window = (shape.heads, shape.dim) if by_head else (1, shape.width)
    over_rows = not keeps_time and (shape.time > 1 or (not keeps_batch and shape.batch > 1))
    over_batch = not over_rows and not keeps_batch and shape.batch > 1
    apart = over_batch or (over_rows and keeps_batch)
    sequences, rows = (shape.batch, shape.time) if apart else (1, shape.rows)
    if over_rows and keeps_dim:
        # Every column has a float64 sum: against few rows that would show.
        tile = tile_of(rows, window, widest=64, tallest=64)
    else:
        tile = tile_of(rows, window)
    row_tiles, column_tiles = tiles_of(rows, tile.rows), tiles_of(window, tile.columns)
    dims = shape.dim if keeps_dim else 1
    sum_width = (shape.heads if keeps_head else 1) * dims
    if over_rows:
        # (sequences, parts, sum_width): tiles that an entry does not keep apart are parts of it.
        tile_parts = 1 if keeps_dim else column_tiles
        parts = tile_parts * (1 if keeps_head or not by_head else windows)
        loops = (False, False, False)
        strides = (
            row_tiles * parts * sum_width,
            parts * sum_width,
            dims if keeps_head else tile_parts * sum_width,
            tile.columns if keeps_dim else sum_width,
        )
        parts *= row_tiles
    else:
        parts = 1
        loops = (over_batch, by_head and not keeps_head, not keeps_dim)
        strides = (0, sum_width, dims if keeps_head else 0, tile.columns if keeps_dim else 0)
    return Backward(
        *(tile, sequences, rows, window, windows, row_tiles, column_tiles),
        *(over_rows, not keeps_dim, loops, parts, sum_width, strides),
    )

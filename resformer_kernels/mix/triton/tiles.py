"""Tiles of V: device functions that the mixing kernels share, and the tuples of their arguments.

V is seen as rows, one for each (batch, time), of heads * DIM columns; column c is element c % DIM
of head c // DIM. JOINED says that every operand of V's shape has its heads one after another in
memory: columns are then read without finding their head.

An id outside the table gives rows of NaN and no gradient: nothing is read or written there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton import device
from resformer_kernels._triton.specialise import Stride
from resformer_kernels._triton.views import Coefficient, View, coefficient_of, form_over_tile

ELEMENTS = 4096
"""Elements of a tile: two to four loads of 16 bytes in flight for each thread of four warps."""


class Shape(NamedTuple):
    """V's shape; packed tensors have batch 1."""

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
        """Columns of a row: heads and head_dim as one axis."""
        return self.heads * self.dim


class Size(NamedTuple):
    """Rows and columns of a program's tile, powers of two."""

    rows: int
    columns: int


class Layout(NamedTuple):
    """How kernels see V's axes."""

    time: int
    width: Stride
    DIM: tl.constexpr
    JOINED: tl.constexpr


class Ids(NamedTuple):
    """The table's row for each (batch, time), by strides, and the number of rows."""

    pointer: Tensor | None
    batch: int
    time: int
    vocab: int


class Source(NamedTuple):
    """One source of a mix: values, or rows of a table that `ids` selects, and a coefficient."""

    value: View
    ids: Ids
    coefficient: Coefficient
    FORM: tl.constexpr


class Tile(NamedTuple):
    """Rows (ROWS,) and columns (BLOCK,) of a tile, and their masks."""

    rows: Any
    batch: Any
    time: Any
    columns: Any
    row_mask: Any
    column_mask: Any


NO_IDS = Ids(None, 0, 0, 0)


def shape_of(v: Tensor) -> Shape:
    """The shape of V, or of its gradient."""
    return Shape(*v.shape) if v.dim() == 4 else Shape(1, *v.shape)


def layout_of(shape: Shape, views: Iterable[View]) -> Layout:
    """The layout for operands of one shape."""
    joined = all(view.pointer is None or view.head == shape.dim for view in views)
    return Layout(shape.time, shape.width, tl.constexpr(shape.dim), tl.constexpr(joined))


def source_of(value: View, c: Tensor | None, number: float, ids: Ids = NO_IDS) -> Source:
    """A source whose coefficient is a tensor, or the number."""
    coefficient = coefficient_of(c, number)
    form = form_over_tile(
        coefficient,
        rows=coefficient.batch != 0 or coefficient.time != 0,
        columns=coefficient.head != 0 or coefficient.column != 0,
    )
    return Source(value, ids, coefficient, tl.constexpr(form))


def table_source(table: Tensor, token_ids: Tensor, gate: Tensor | None, number: float) -> Source:
    """gate * table[token_ids]."""
    batch = token_ids.stride(0) if token_ids.dim() == 2 else 0
    ids = Ids(token_ids, batch, token_ids.stride(-1), table.shape[0])
    return source_of(View(table, 0, table.stride(0), table.stride(1)), gate, number, ids)


def tiles_of(size: int, tile: int) -> int:
    """How many tiles cover `size`."""
    return -(-size // tile)


def size_of(rows: int, width: int, widest: int = 1024, tallest: int = ELEMENTS) -> Size:
    """The size of tiles over (rows, width): wide, since adjacent columns are adjacent in memory."""
    columns = min(_power_of_two(width), widest)
    return Size(min(_power_of_two(rows), tallest, max(1, ELEMENTS // columns)), columns)


def _power_of_two(size: int) -> int:
    return 1 << (max(1, size) - 1).bit_length()


def sum_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which products of `dtype` are exact."""
    return tl.float64 if dtype is torch.float32 else tl.float32


@triton.jit
def tile_at(layout, rows, row_mask, columns, column_mask):
    """The tile of these rows (ROWS,) and columns (BLOCK,)."""
    time = layout.time
    return Tile(rows, rows // time, rows % time, columns, row_mask, column_mask)


@triton.jit
def mask_of(tile):
    """(ROWS, BLOCK)."""
    return tile.row_mask[:, None] & tile.column_mask[None, :]


@triton.jit
def offsets_of(tile, layout):
    """(ROWS, BLOCK) offsets into a contiguous tensor of V's shape."""
    return (tile.rows * layout.width)[:, None] + tile.columns[None, :]


@triton.jit
def load(view, layout, tile):
    """A tile in float32, 0 outside the masks."""
    along_rows = tile.batch * view.batch + tile.time * view.time
    if layout.JOINED:
        along_columns = tile.columns.to(tl.int64)
    else:
        head, element = tile.columns // layout.DIM, tile.columns % layout.DIM
        along_columns = head.to(tl.int64) * view.head + element
    at = view.pointer + along_rows[:, None] + along_columns[None, :]  # (ROWS, BLOCK)
    return device.widen(tl.load(at, mask=mask_of(tile), other=0.0))


@triton.jit
def load_source(source, layout, tile):
    """A tile of values, or of rows of a table, in float32."""
    if source.ids.pointer is not None:
        at = source.ids.pointer + tile.batch * source.ids.batch + tile.time * source.ids.time
        row = tl.load(at, mask=tile.row_mask, other=0).to(tl.int64)  # (ROWS,)
        exists = (row >= 0) & (row < source.ids.vocab)
        found = Tile(
            tile.rows, tile.batch, row, tile.columns, tile.row_mask & exists, tile.column_mask
        )
        x = load(source.value, layout, found)
        x = tl.where(exists[:, None], x, float("nan"))
    else:
        x = load(source.value, layout, tile)
    return x


@triton.jit
def coefficient_over(source, layout, tile):
    """A source's coefficient in a shape that broadcasts to the tile."""
    c = source.coefficient
    along_rows = tile.batch * c.batch + tile.time * c.time
    head, element = tile.columns // layout.DIM, tile.columns % layout.DIM
    along_columns = head.to(tl.int64) * c.head + element * c.column
    return device.coefficient(
        c.pointer,
        c.number,
        along_rows,
        along_columns,
        1,
        1,
        tile.row_mask,
        tile.column_mask,
        source.FORM,
    )

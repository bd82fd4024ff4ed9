"""Where the rows, keys and values of a tile lie in memory, and how they are read and written."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from resformer_kernels._triton.device import NUMBER, PER_ROW, coefficient, mix, round_to, widen

ROW_SLOT: tl.constexpr = tl.constexpr(128)


class Source(NamedTuple):
    """A tensor that is read or written by tiles, through its descriptor where there is one.

    WIDTH columns in tiles of BLOCK columns. It holds constants: make it in the call that takes it.
    """

    view: Any
    descriptor: Any
    geometry: Any
    WIDTH: Any
    BLOCK: Any


class Mixed(NamedTuple):
    """The sources of V', or `v` alone, and `how` to mix them: the kernel's `Values`."""

    v: Any
    v_first: Any
    how: Any


class RowNumbers(NamedTuple):
    """One float32 number a row, at `slot` of a buffer: see `row_slot`."""

    pointer: Any
    descriptor: Any
    slot: Any


@triton.jit
def at_head(view, batch, time, head):
    """Pointer to (batch, time, head), in 64 bits."""
    offset = tl.cast(batch, tl.int64) * view.batch + tl.cast(time, tl.int64) * view.time
    return view.pointer + (offset + tl.cast(head, tl.int64) * view.head)


@triton.jit
def row_slot(at, slots, geometry):
    """Where backward keeps its numbers of a KV head's rows, one after the other, in (heads, slots).

    At multiples of ROW_SLOT: descriptors want that, and any tile of rows divides it. Past the last
    row there are zeros, as far as tiles reach.
    """
    if geometry.PACKED:
        before = at.q_start
    else:
        before = at.sequence * at.q_len
    first = (before * geometry.GROUP + at.sequence * ROW_SLOT) // ROW_SLOT * ROW_SLOT
    return at.head * slots + first


@triton.jit
def load_row_numbers(numbers, first_row, ROWS: tl.constexpr):
    """(ROWS,) numbers from first_row on; zero past the last row, as `rows_kernel` writes them."""
    if numbers.descriptor is None:
        found = tl.load(numbers.pointer + numbers.slot + first_row + tl.arange(0, ROWS))
    else:
        found = numbers.descriptor.load([numbers.slot + first_row])
    return found


@triton.jit
def row_cells(view, at, rows, GROUP: tl.constexpr):
    """Pointers to one number a row, as the LSE has it."""
    queries = (rows // GROUP).to(tl.int64) * view.time
    members = (rows % GROUP).to(tl.int64) * view.head
    return at_head(view, at.batch, at.q_start, at.head * GROUP) + (queries + members)


@triton.jit
def row_pointers(source, at, rows, columns):
    """(ROWS, BLOCK) pointers to a tile of rows."""
    return row_cells(source.view, at, rows, source.geometry.GROUP)[:, None] + columns[None, :]


@triton.jit
def load_rows(pointers, rows, count, columns, source):
    """A tile, zero in rows from `count` on and columns from WIDTH on."""
    if source.WIDTH == source.BLOCK:
        tile = tl.load(pointers, mask=(rows < count)[:, None], other=0.0)
    else:
        inside = (rows < count)[:, None] & (columns < source.WIDTH)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def load_columns(pointers, columns, source):
    """A tile whose rows all exist, zero in columns from WIDTH on."""
    if source.WIDTH == source.BLOCK:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(columns < source.WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def load_row_tile(source, at, first_row, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """(ROWS, BLOCK) of the rows from first_row on; zero past the last row where MASKED."""
    rows = first_row + tl.arange(0, ROWS)
    if source.descriptor is not None:
        start = [at.batch, at.q_start + first_row // source.geometry.GROUP, at.head, 0, 0]
        tile = source.descriptor.load(start).reshape(ROWS, source.BLOCK)
        if MASKED and source.geometry.PACKED:
            tile = tl.where((rows < at.count)[:, None], tile, tl.zeros_like(tile))
    else:
        columns = tl.arange(0, source.BLOCK)
        pointers = row_pointers(source, at, rows, columns)
        if MASKED:
            tile = load_rows(pointers, rows, at.count, columns, source)
        else:
            tile = load_columns(pointers, columns, source)
    return tile


@triton.jit
def store_rows(tile, source, at, rows):
    """Write a tile of rows, rounded to the tensor's dtype, as far as the last row."""
    columns = tl.arange(0, source.BLOCK)
    rounded = round_to(tile, source.view.pointer.dtype.element_ty)
    inside = (rows < at.count)[:, None] & (columns < source.WIDTH)[None, :]
    tl.store(row_pointers(source, at, rows, columns), rounded, mask=inside)


@triton.jit
def key_cells(view, at, keys):
    """Pointers to the first column of each key."""
    return at_head(view, at.batch, at.k_start, at.head) + keys.to(tl.int64) * view.time


@triton.jit
def key_pointers(view, at, keys, columns):
    """(KEYS, BLOCK) pointers to a tile of keys."""
    cells = at_head(view, at.batch, at.k_start, at.head) + keys.to(tl.int64)[:, None] * view.time
    return cells + columns[None, :]


@triton.jit
def load_keys(
    source, at, key, KEYS: tl.constexpr, MASKED: tl.constexpr, ZERO_TAIL: tl.constexpr = True
):
    """(KEYS, BLOCK) of the keys (or values) from `key` on.

    MASKED: keys past the last one are zero; without ZERO_TAIL a descriptor may load the next
    sequence's instead.
    """
    keys = key + tl.arange(0, KEYS)
    if source.descriptor is not None:
        start = [at.batch, at.k_start + key, at.head, 0]
        tile = source.descriptor.load(start).reshape(KEYS, source.BLOCK)
        if MASKED and ZERO_TAIL and source.geometry.PACKED:
            # The descriptor knows where the tensor ends, not where the sequence does.
            tile = tl.where((keys < at.k_len)[:, None], tile, tl.zeros_like(tile))
    else:
        columns = tl.arange(0, source.BLOCK)
        pointers = key_pointers(source.view, at, keys, columns)
        if MASKED:
            tile = load_rows(pointers, keys, at.k_len, columns, source)
        else:
            tile = load_columns(pointers, columns, source)
    return tile


@triton.jit
def store_keys(tile, source, at, key, KEYS: tl.constexpr):
    """Write a tile of keys (or values), rounded to the tensor's dtype, as far as the last key."""
    rounded = round_to(tile, source.view.pointer.dtype.element_ty)
    if source.descriptor is not None:
        start = [at.batch, at.k_start + key, at.head, 0]
        source.descriptor.store(start, rounded.reshape(1, KEYS, 1, source.BLOCK))
    else:
        keys = key + tl.arange(0, KEYS)
        columns = tl.arange(0, source.BLOCK)
        inside = (keys < at.k_len)[:, None] & (columns < source.WIDTH)[None, :]
        tl.store(key_pointers(source.view, at, keys, columns), rounded, mask=inside)


@triton.jit
def load_factor(factor, source, at, key, KEYS: tl.constexpr):
    """A mixing coefficient over the tile of `source` that `load_keys` would load."""
    if factor.FORM == NUMBER:
        found = factor.number
    else:
        keys = key + tl.arange(0, KEYS)
        found = factor_at(factor, source, at, keys, keys < at.k_len)
    return found


@triton.jit
def factor_at(factor, source, at, keys, inside):
    """A mixing coefficient at any keys, read where they are `inside`."""
    if factor.FORM == NUMBER:
        found = factor.number
    else:
        columns = tl.arange(0, source.BLOCK)
        base = at_head(factor, at.batch, at.k_start, at.head)
        found = coefficient(
            base, factor.number, keys.to(tl.int64), columns, factor.time, factor.column,
            inside, columns < source.WIDTH, factor.FORM,
        )  # fmt: skip
    return found


@triton.jit
def load_values(mixed, at, key, KEYS: tl.constexpr, MASKED: tl.constexpr):
    """(KEYS, BLOCK) of V', zero past the last key where MASKED, whatever lies there."""
    if mixed.how.MIXES:
        own_tile = load_keys(mixed.v, at, key, KEYS, MASKED, False)
        first_tile = load_keys(mixed.v_first, at, key, KEYS, MASKED, False)
        own = load_factor(mixed.how.own, mixed.v, at, key, KEYS)
        first = load_factor(mixed.how.first, mixed.v, at, key, KEYS)
        tile = mix(own, own_tile, first, first_tile, own_tile.dtype)
        if MASKED:
            # Masking the values is not enough: a coefficient may be infinite.
            inside = key + tl.arange(0, KEYS) < at.k_len
            tile = tl.where(inside[:, None], tile, tl.zeros_like(tile))
    else:
        tile = load_keys(mixed.v, at, key, KEYS, MASKED)
    return tile


@triton.jit
def load_own_values(mixed, at, rows):
    """(ROWS, BLOCK) of V' at the position of each row's query, zero where that holds no key."""
    keys = rows // mixed.v.geometry.GROUP + at.shift
    columns = tl.arange(0, mixed.v.BLOCK)
    # Rows that have no such key, as rows past the last.
    rows = tl.where(keys >= 0, rows, at.count)
    pointers = key_pointers(mixed.v.view, at, keys, columns)
    tile = load_rows(pointers, rows, at.count, columns, mixed.v)
    if mixed.how.MIXES:
        pointers = key_pointers(mixed.v_first.view, at, keys, columns)
        first_tile = load_rows(pointers, rows, at.count, columns, mixed.v_first)
        own = factor_at(mixed.how.own, mixed.v, at, keys, rows < at.count)
        first = factor_at(mixed.how.first, mixed.v, at, keys, rows < at.count)
        tile = mix(own, tile, first, first_tile, tile.dtype)
        # A coefficient may be infinite.
        tile = tl.where((rows < at.count)[:, None], tile, tl.zeros_like(tile))
    return tile


@triton.jit
def load_row_factor(factor, at, rows, columns, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    """exclusive or out_gate over a tile of rows, in a shape that broadcasts to it."""
    if factor.FORM == NUMBER:
        found = factor.number
    else:
        cells = row_cells(factor, at, rows, GROUP)
        there = rows < at.count
        if factor.FORM == PER_ROW:
            found = widen(tl.load(cells, mask=there, other=0.0))[:, None]
        else:
            cells = cells[:, None] + columns.to(tl.int64)[None, :] * factor.column
            inside = there[:, None] & (columns < WIDTH)[None, :]
            found = widen(tl.load(cells, mask=inside, other=0.0))
    return found

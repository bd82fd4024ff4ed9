"""Where the rows, keys and values of a tile lie in memory, and how they are read and written."""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels._triton.device import NUMBER, coefficient, mix, round_to

ROW_SLOT: tl.constexpr = tl.constexpr(128)


@triton.jit
def at_head(view, batch, time, head):
    """Where (batch, time, head) lies in memory, in 64 bits."""
    offset = tl.cast(batch, tl.int64) * view.batch + tl.cast(time, tl.int64) * view.time
    return view.pointer + (offset + tl.cast(head, tl.int64) * view.head)


@triton.jit
def row_slot(sequence, q_start, head, q_len, slots, GROUP: tl.constexpr, PACKED: tl.constexpr):
    """Where backward keeps its numbers of a KV head's rows, one after the other, in (heads, slots).

    At multiples of ROW_SLOT, which descriptors want and which any tile of rows divides.
    """
    if PACKED:
        before = q_start
    else:
        before = sequence * q_len
    first = (before * GROUP + sequence * ROW_SLOT) // ROW_SLOT * ROW_SLOT
    return head * slots + first


@triton.jit
def load_row_numbers(
    numbers, descriptor, slot, first_row, count, ROWS: tl.constexpr, MASKED: tl.constexpr
):
    """One number each of ROWS rows from first_row on; zero from `count` on where MASKED."""
    rows = first_row + tl.arange(0, ROWS)
    if descriptor is None:
        found = tl.load(numbers + slot + rows, mask=rows < count, other=0.0)
    else:
        found = descriptor.load([slot + first_row])
        if MASKED:
            found = tl.where(rows < count, found, 0.0)
    return found


@triton.jit
def row_pointers(view, base, rows, columns, GROUP: tl.constexpr):
    """Pointers to a tile of rows; `base` is the first query of the KV head's first head."""
    queries = (rows // GROUP).to(tl.int64) * view.time + (rows % GROUP).to(tl.int64) * view.head
    return base + queries[:, None] + columns[None, :]


@triton.jit
def load_rows(pointers, rows, count, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile, zero in rows from `count` on and columns from WIDTH on."""
    if WIDTH == BLOCK:
        tile = tl.load(pointers, mask=(rows < count)[:, None], other=0.0)
    else:
        inside = (rows < count)[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def load_row_tile(
    view,
    descriptor,
    batch,
    start,
    first_row,
    head,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """ROWS rows of KV head `head`, from first_row on; zero from `count` on where MASKED."""
    rows = first_row + tl.arange(0, ROWS)
    if descriptor is not None:
        at = [batch, start + first_row // GROUP, head, 0, 0]
        tile = descriptor.load(at).reshape(ROWS, BLOCK)
        if MASKED and PACKED:
            tile = tl.where((rows < count)[:, None], tile, tl.zeros_like(tile))
    else:
        columns = tl.arange(0, BLOCK)
        base = at_head(view, batch, start, head * GROUP)
        pointers = row_pointers(view, base, rows, columns, GROUP)
        if MASKED:
            tile = load_rows(pointers, rows, count, columns, WIDTH, BLOCK)
        elif WIDTH == BLOCK:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def load_keys(
    view,
    descriptor,
    batch,
    start,
    key,
    head,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """KEYS keys (or values) from `key` on of the sequence that begins at `start`.

    Where MASKED, what lies from `count` on is zero.
    """
    keys = key + tl.arange(0, KEYS)
    if descriptor is not None:
        tile = descriptor.load([batch, start + key, head, 0]).reshape(KEYS, BLOCK)
        if MASKED and PACKED:
            # The descriptor knows where the tensor ends, not where the sequence does.
            tile = tl.where((keys < count)[:, None], tile, tl.zeros_like(tile))
    else:
        columns = tl.arange(0, BLOCK)
        at = at_head(view, batch, start, head) + keys.to(tl.int64)[:, None] * view.time
        if MASKED:
            tile = load_rows(at + columns[None, :], keys, count, columns, WIDTH, BLOCK)
        elif WIDTH == BLOCK:
            tile = tl.load(at + columns[None, :])
        else:
            tile = tl.load(at + columns[None, :], mask=(columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_keys(
    tile,
    view,
    descriptor,
    batch,
    start,
    key,
    head,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write a tile of keys (or values), rounded to the tensor's dtype, as far as `count`."""
    rounded = round_to(tile, view.pointer.dtype.element_ty)
    if descriptor is not None:
        descriptor.store([batch, start + key, head, 0], rounded.reshape(1, KEYS, 1, BLOCK))
    else:
        keys = key + tl.arange(0, KEYS)
        columns = tl.arange(0, BLOCK)
        at = at_head(view, batch, start, head) + keys.to(tl.int64)[:, None] * view.time
        inside = (keys < count)[:, None] & (columns < WIDTH)[None, :]
        tl.store(at + columns[None, :], rounded, mask=inside)


@triton.jit
def load_coefficient(
    c,
    batch,
    start,
    key,
    head,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    FORM: tl.constexpr,
):
    """A mixing coefficient over the tile that `load_keys` would load."""
    if FORM == NUMBER:
        found = c.number
    else:
        keys = key + tl.arange(0, KEYS)
        columns = tl.arange(0, BLOCK)
        base = at_head(c, batch, start, head)
        rows = keys.to(tl.int64)
        found = coefficient(
            base, c.number, rows, columns, c.time, c.column, keys < count, columns < WIDTH, FORM
        )
    return found


@triton.jit
def load_values(
    values,
    v_descriptor,
    first_descriptor,
    batch,
    start,
    key,
    head,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    OWN_FORM: tl.constexpr,
    FIRST_FORM: tl.constexpr,
    MIXES: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """A tile of V', zero from `count` on where MASKED, whatever lies there."""
    if MIXES:
        own_tile = load_keys(
            values.v, v_descriptor, batch, start, key, head, count, WIDTH, BLOCK, KEYS, MASKED,
            False,
        )  # fmt: skip
        first_tile = load_keys(
            values.v_first, first_descriptor, batch, start, key, head, count, WIDTH, BLOCK, KEYS,
            MASKED, False,
        )  # fmt: skip
        own = load_coefficient(
            values.own, batch, start, key, head, count, WIDTH, BLOCK, KEYS, OWN_FORM
        )
        first = load_coefficient(
            values.first, batch, start, key, head, count, WIDTH, BLOCK, KEYS, FIRST_FORM
        )
        tile = mix(own, own_tile, first, first_tile, own_tile.dtype)
        if MASKED:
            # Not by the values alone: a coefficient may be infinite.
            inside = key + tl.arange(0, KEYS) < count
            tile = tl.where(inside[:, None], tile, tl.zeros_like(tile))
    else:
        tile = load_keys(
            values.v, v_descriptor, batch, start, key, head, count, WIDTH, BLOCK, KEYS, MASKED,
            PACKED,
        )  # fmt: skip
    return tile

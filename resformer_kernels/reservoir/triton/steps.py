"""What one program of `triton_kernels.py` does in one step: a tile of chunks by units.

A row's arithmetic is its own: every unit sums its inputs in order of k, then SPLIT parts of its
neighbours, each in order of k, and adds the parts in a fixed tree. Neither ROWS nor UNITS changes a
bit of that. Pointers and sizes come as the tuples of `triton_launch.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from resformer_kernels._triton import device as lib

GROUPS: tl.constexpr = tl.constexpr(0)
ENTRIES: tl.constexpr = tl.constexpr(1)
CSR: tl.constexpr = tl.constexpr(2)

TANH: tl.constexpr = tl.constexpr(0)
RELU: tl.constexpr = tl.constexpr(1)

CHECK_EVERY: tl.constexpr = tl.constexpr(8)
"""Steps between comparisons with a stored trajectory."""
DEPTH: tl.constexpr = tl.constexpr(16)
"""Neighbours, or inputs, of a product's step; what is packed is padded to multiples of it."""
ENTRIES_AT_ONCE: tl.constexpr = tl.constexpr(4)
"""Of a CSR row: they are loaded before the first of them is added."""

# numpy multiplies matrices in an order of its own: rounded once, from float64, it does not show.
SUM: tl.constexpr = tl.constexpr(tl.float64 if lib.INTERPRETED.value else tl.float32)


class Tile(NamedTuple):
    """UNITS units of one group, and whether these are the first of all."""

    group: Any
    local: Any
    """Within the group."""
    unit: Any
    wide: Any
    """Those that there are."""
    first: Any


class Rows(NamedTuple):
    """ROWS chunks at one step."""

    running: Any
    before: Any
    """Pointers: the states before the step."""
    gains: Any
    """In the adjoint: their gains."""
    gained: Any
    """Whether they have gains: the very first states have not, and are zero."""
    inputs: Any


@triton.jit
def tile_at(number, sizes, UNITS: tl.constexpr):
    """The tile of that number."""
    each = sizes.padded // UNITS
    group = tl.full((), 0, tl.int32) + number // each
    local = number % each * UNITS + tl.arange(0, UNITS)
    return Tile(group, local, group * sizes.size + local, local < sizes.size, number == 0)


@triton.jit
def _product(a, b, acc):
    if lib.INTERPRETED:
        product = tl.dot(a.to(tl.float64), lib.widen(b).to(tl.float64), acc, out_dtype=tl.float64)
    else:
        product = tl.dot(a, lib.widen(b), acc, input_precision="ieee")
    return product


@triton.jit
def _halved(x, ROWS: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr):
    left, right = tl.split(tl.reshape(x, (ROWS, UNITS, PARTS // 2, 2)))
    return left + right


@triton.jit
def _sum_of_parts(acc, ROWS: tl.constexpr, UNITS: tl.constexpr, SPLIT: tl.constexpr):
    """acc (SPLIT, ROWS, UNITS) summed over its parts, neighbours first, whatever its layout."""
    x = tl.permute(acc, (1, 2, 0))
    if SPLIT >= 8:
        x = _halved(x, ROWS, UNITS, 8)
    if SPLIT >= 4:
        x = _halved(x, ROWS, UNITS, 4)
    if SPLIT >= 2:
        x = _halved(x, ROWS, UNITS, 2)
    return tl.reshape(x, (ROWS, UNITS)).to(tl.float32)


@triton.jit
def _sent(rows, columns, mask, ADJOINT: tl.constexpr):
    """What W multiplies: the states before the step, in the adjoint times their gains."""
    # Other programs wrote them: .cg reads no stale line of the first-level cache.
    h = tl.load(rows.before[:, None] + columns, mask=mask, other=0.0, cache_modifier=".cg")
    if ADJOINT:
        gained = mask & rows.gained[:, None]
        h *= tl.load(rows.gains[:, None] + columns, mask=gained, other=0.0)
    return h


@triton.jit
def _dense(
    rows,
    tile,
    w,
    sizes,
    ADJOINT: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    acc = tl.zeros((SPLIT, ROWS, UNITS), SUM)
    part = tl.arange(0, SPLIT)[:, None] * sizes.part
    packed = w.weight + tile.group.to(tl.int64) * (SPLIT * sizes.part * sizes.padded)
    for k0 in range(0, sizes.part, DEPTH):
        k = part + k0 + tl.arange(0, DEPTH)[None, :]
        column = (tile.group * sizes.size + k)[:, None, :]
        mask = (k < sizes.size)[:, None, :] & rows.running[None, :, None]
        at = rows.before[None, :, None] + column
        h = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        if ADJOINT:
            gained = mask & rows.gained[None, :, None]
            h *= tl.load(rows.gains[None, :, None] + column, mask=gained, other=0.0)
        b = tl.load(packed + k[:, :, None] * sizes.padded + tile.local[None, None, :])
        acc = _product(h, b, acc)
    return _sum_of_parts(acc, ROWS, UNITS, SPLIT)


@triton.jit
def _sparse(rows, tile, w, ADJOINT: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):
    first = tl.load(w.rows + tile.unit, mask=tile.wide, other=0)
    count = tl.load(w.rows + tile.unit + 1, mask=tile.wide, other=0) - first
    total = tl.zeros((ROWS, UNITS), tl.float32)
    for e0 in range(0, tl.max(count), ENTRIES_AT_ONCE):
        loaded = ()
        for u in tl.static_range(ENTRIES_AT_ONCE):
            there = e0 + u < count
            column = tl.load(w.columns + first + e0 + u, mask=there, other=0)
            value = tl.load(w.weight + first + e0 + u, mask=there, other=0.0)
            mask = rows.running[:, None] & there[None, :]
            loaded += (value, _sent(rows, column[None, :], mask, ADJOINT))
        for u in tl.static_range(ENTRIES_AT_ONCE):
            value = tl.broadcast_to(loaded[2 * u][None, :], (ROWS, UNITS))
            total = tl.fma(value, loaded[2 * u + 1], total)
    return total


@triton.jit
def _neighbours(
    rows,
    tile,
    w,
    sizes,
    KIND: tl.constexpr,
    ADJOINT: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """W h of one tile."""
    if KIND == GROUPS:
        total = _dense(rows, tile, w, sizes, ADJOINT, SPLIT, ROWS, UNITS)
    elif KIND == CSR:
        total = _sparse(rows, tile, w, ADJOINT, ROWS, UNITS)
    else:
        column = tl.load(w.columns + tile.unit, mask=tile.wide, other=0)
        value = tl.load(w.weight + tile.unit, mask=tile.wide, other=0.0)
        mask = rows.running[:, None] & tile.wide[None, :]
        total = value[None, :] * _sent(rows, column[None, :], mask, ADJOINT)
    return total


@triton.jit
def _drive(
    rows,
    tile,
    inputs,
    w,
    sizes,
    PROJECTED: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """W_in u of one tile, or its drive."""
    if PROJECTED:
        acc = tl.zeros((ROWS, UNITS), SUM)
        position = tile.group * sizes.padded + tile.local
        for k0 in range(0, sizes.inputs, DEPTH):
            k = k0 + tl.arange(0, DEPTH)
            mask = rows.running[:, None] & (k < sizes.inputs)[None, :]
            u = tl.load(inputs + rows.inputs[:, None] + k[None, :], mask=mask, other=0.0)
            b = tl.load(w.input_weight + k[:, None] * sizes.width + position[None, :])
            acc = _product(u, b, acc)
        z = acc.to(tl.float32)
    else:
        mask = rows.running[:, None] & tile.wide[None, :]
        z = tl.load(inputs + rows.inputs[:, None] + tile.unit[None, :], mask=mask, other=0.0)
    return z


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == TANH:
        f, _ = lib.tanh(z)
    elif ACTIVATION == RELU:
        # A NaN stays.
        f = tl.where(z < 0.0, 0.0, z)
    else:
        f = z
    return f


@triton.jit
def next_states(
    rows,
    tile,
    inputs,
    w,
    sizes,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADJOINT: tl.constexpr,
    PROJECTED: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """h_t of one tile; in the adjoint keep h + (drive + W (gain h))."""
    # What does not wait for W comes first.
    mask = rows.running[:, None] & tile.wide[None, :]
    at = rows.before[:, None] + tile.unit[None, :]
    own = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    keep = tl.load(w.keep + tile.unit, mask=tile.wide, other=0.0)[None, :]
    z = _drive(rows, tile, inputs, w, sizes, PROJECTED, ROWS, UNITS)
    z += _neighbours(rows, tile, w, sizes, KIND, ADJOINT, SPLIT, ROWS, UNITS)
    if w.bias is not None:
        z += tl.load(w.bias + tile.unit, mask=tile.wide, other=0.0)[None, :]
    if ADJOINT:
        fresh = z
    else:
        amplitude = tl.load(w.amplitude + tile.unit, mask=tile.wide, other=0.0)[None, :]
        fresh = amplitude * _activate(z, ACTIVATION)
    return tl.fma(tl.broadcast_to(keep, (ROWS, UNITS)), own, fresh)

"""One step of one program of the reservoir's kernel: a tile of chunks by units.

A row's arithmetic is its own: every unit sums its inputs in order of k, then SPLIT parts of its
neighbours, each in order of k, and adds the parts in a fixed tree. Neither ROWS nor UNITS changes a
bit of that.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, TypeAlias

import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton import device
from resformer_kernels._triton.specialise import Stride
from resformer_kernels.reservoir import record

GROUPS: tl.constexpr = tl.constexpr(0)
ENTRIES: tl.constexpr = tl.constexpr(1)
CSR: tl.constexpr = tl.constexpr(2)

TANH: tl.constexpr = tl.constexpr(record.TANH)
RELU: tl.constexpr = tl.constexpr(record.RELU)
SIGMOID: tl.constexpr = tl.constexpr(record.SIGMOID)
SOFTPLUS: tl.constexpr = tl.constexpr(record.SOFTPLUS)

CHECK_EVERY: tl.constexpr = tl.constexpr(8)
"""Steps between comparisons with a stored trajectory."""
DEPTH: tl.constexpr = tl.constexpr(16)
"""Neighbours, or inputs, of one product; packed weights are padded to multiples of it."""
ENTRIES_AT_ONCE: tl.constexpr = tl.constexpr(4)
"""Entries of a CSR row that are loaded before the first of them is added."""

# numpy multiplies matrices in an order of its own: rounded once, from float64, it does not show.
SUM: tl.constexpr = tl.constexpr(tl.float64 if device.INTERPRETED.value else tl.float32)


class Form(NamedTuple):
    """Constants of the kernel: each is compiled on its own."""

    KIND: tl.constexpr
    """GROUPS, ENTRIES or CSR."""
    ACTIVATION: tl.constexpr
    ADJOINT: tl.constexpr
    PROJECTED: tl.constexpr
    """Whether the inputs are multiplied by W_in, or are the drive itself."""
    CHUNKED: tl.constexpr
    """False: one sweep, in which nothing is compared."""
    INDEPENDENT: tl.constexpr
    """No unit reads another."""
    SPLIT: tl.constexpr
    """Parts of the sum over neighbours."""
    ROWS: tl.constexpr
    UNITS: tl.constexpr


class Weights(NamedTuple):
    """What all steps share. Matrices are packed: k by padded units."""

    weight: Tensor
    rows: Tensor | None
    columns: Tensor | None
    input_weight: Tensor | None
    retain: Tensor
    """1 - leak."""
    leak: Tensor | None
    """None in the adjoint."""
    bias: Tensor | None


Padded: TypeAlias = Annotated[int, "padded"]
"""A stride in which each group's units are padded: `specialise.Stride` of its own."""


class Sizes(NamedTuple):
    """Run-time lengths and strides."""

    units: Stride
    size: Stride
    """Units of a group."""
    padded: Padded
    """The same, in whole tiles and in multiples of DEPTH."""
    width: Padded
    """Padded units of all groups."""
    part: Padded
    """Neighbours of one part of the sum over k."""
    inputs: int
    input_step: int
    direction: int
    """1, or -1 back in time."""
    unit_tiles: int
    rows: int
    """Chunks at most."""


class Tile(NamedTuple):
    """UNITS units of one group."""

    group: Any
    local: Any
    """Within the group."""
    unit: Any
    exists: Any
    """False beyond the group's last unit."""


class Rows(NamedTuple):
    """ROWS chunks at one step."""

    running: Any
    before: Any
    """Pointers to the states before the step."""
    gains: Any
    """Pointers to their gains, in the adjoint."""
    gained: Any
    """Whether they have gains: the very first states have not, and are zero."""
    inputs: Any
    """Offsets, in elements."""


@triton.jit
def tile_at(number, sizes, UNITS: tl.constexpr):
    """The tile of that number."""
    tiles = tl.cdiv(sizes.size, UNITS)
    group = tl.full((), 0, tl.int32) + number // tiles
    local = number % tiles * UNITS + tl.arange(0, UNITS)
    return Tile(group, local, group * sizes.size + local, local < sizes.size)


@triton.jit
def _product(a, b, acc):
    if device.INTERPRETED:
        product = tl.dot(
            a.to(tl.float64), device.widen(b).to(tl.float64), acc, out_dtype=tl.float64
        )
    else:
        product = tl.dot(a, device.widen(b), acc, input_precision="ieee")
    return product


@triton.jit
def _halved(x, ROWS: tl.constexpr, UNITS: tl.constexpr, PARTS: tl.constexpr):
    left, right = tl.split(tl.reshape(x, (ROWS, UNITS, PARTS // 2, 2)))
    return left + right


@triton.jit
def _sum_of_parts(acc, ROWS: tl.constexpr, UNITS: tl.constexpr, SPLIT: tl.constexpr):
    """acc (SPLIT, ROWS, UNITS) summed over its parts, neighbours first, whatever its layout."""
    # (ROWS, UNITS, SPLIT)
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
def _dense(rows, tile, w, sizes, form):
    # (SPLIT, ROWS, UNITS)
    acc = tl.zeros((form.SPLIT, form.ROWS, form.UNITS), SUM)
    part = tl.arange(0, form.SPLIT)[:, None] * sizes.part
    packed = w.weight + tile.group.to(tl.int64) * (form.SPLIT * sizes.part * sizes.padded)
    for k0 in range(0, sizes.part, DEPTH):
        # (SPLIT, DEPTH)
        k = part + k0 + tl.arange(0, DEPTH)[None, :]
        column = (tile.group * sizes.size + k)[:, None, :]
        # (SPLIT, ROWS, DEPTH)
        mask = (k < sizes.size)[:, None, :] & rows.running[None, :, None]
        at = rows.before[None, :, None] + column
        h = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        if form.ADJOINT:
            gained = mask & rows.gained[None, :, None]
            h *= tl.load(rows.gains[None, :, None] + column, mask=gained, other=0.0)
        # (SPLIT, DEPTH, UNITS)
        b = tl.load(packed + k[:, :, None] * sizes.padded + tile.local[None, None, :])
        acc = _product(h, b, acc)
    return _sum_of_parts(acc, form.ROWS, form.UNITS, form.SPLIT)


@triton.jit
def _sparse(rows, tile, w, form):
    first = tl.load(w.rows + tile.unit, mask=tile.exists, other=0)
    count = tl.load(w.rows + tile.unit + 1, mask=tile.exists, other=0) - first
    # (ROWS, UNITS)
    total = tl.zeros((form.ROWS, form.UNITS), tl.float32)
    for e0 in range(0, tl.max(count), ENTRIES_AT_ONCE):
        loaded = ()
        for u in tl.static_range(ENTRIES_AT_ONCE):
            exists = e0 + u < count
            column = tl.load(w.columns + first + e0 + u, mask=exists, other=0)
            value = tl.load(w.weight + first + e0 + u, mask=exists, other=0.0)
            mask = rows.running[:, None] & exists[None, :]
            loaded += (value, _sent(rows, column[None, :], mask, form.ADJOINT))
        for u in tl.static_range(ENTRIES_AT_ONCE):
            value = tl.broadcast_to(loaded[2 * u][None, :], (form.ROWS, form.UNITS))
            total = tl.fma(value, loaded[2 * u + 1], total)
    return total


@triton.jit
def _neighbours(rows, tile, w, sizes, form):
    """W h of one tile."""
    if form.KIND == GROUPS:
        total = _dense(rows, tile, w, sizes, form)
    elif form.KIND == CSR:
        total = _sparse(rows, tile, w, form)
    else:
        column = tl.load(w.columns + tile.unit, mask=tile.exists, other=0)
        value = tl.load(w.weight + tile.unit, mask=tile.exists, other=0.0)
        # (ROWS, UNITS)
        mask = rows.running[:, None] & tile.exists[None, :]
        total = value[None, :] * _sent(rows, column[None, :], mask, form.ADJOINT)
    return total


@triton.jit
def _drive(rows, tile, inputs, w, sizes, form):
    """W_in u of one tile, or its drive."""
    if form.PROJECTED:
        # (ROWS, UNITS)
        acc = tl.zeros((form.ROWS, form.UNITS), SUM)
        position = tile.group * sizes.padded + tile.local
        for k0 in range(0, sizes.inputs, DEPTH):
            k = k0 + tl.arange(0, DEPTH)
            # (ROWS, DEPTH), then (DEPTH, UNITS)
            mask = rows.running[:, None] & (k < sizes.inputs)[None, :]
            u = tl.load(inputs + rows.inputs[:, None] + k[None, :], mask=mask, other=0.0)
            b = tl.load(w.input_weight + k[:, None] * sizes.width + position[None, :])
            acc = _product(u, b, acc)
        z = acc.to(tl.float32)
    else:
        # (ROWS, UNITS)
        mask = rows.running[:, None] & tile.exists[None, :]
        z = tl.load(inputs + rows.inputs[:, None] + tile.unit[None, :], mask=mask, other=0.0)
    return z


@triton.jit
def _log1p(t):
    """log(1 + t) for t in [0, 1], as 2 atanh(w): no cancellation near 0."""
    w = tl.math.div_rn(t, t + 2.0)
    v = w * w
    p = tl.fma(v, 0.2815777831, 0.2796515776)
    p = tl.fma(p, v, 0.4002459523)
    p = tl.fma(p, v, 0.6666632164)
    return w * tl.fma(p, v, 2.0)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == TANH:
        f, _ = device.tanh(z)
    elif ACTIVATION == RELU:
        # A NaN stays.
        f = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == SIGMOID:
        # e^30 + 1 is e^30.
        e = device.exp(tl.where(z > 30.0, 30.0, z))
        f = tl.math.div_rn(e, e + 1.0)
    elif ACTIVATION == SOFTPLUS:
        f = tl.where(z < 0.0, 0.0, z) + _log1p(device.exp(-tl.abs(z)))
    else:
        f = z
    return f


@triton.jit
def next_states(rows, tile, inputs, w, sizes, form):
    """h_t of one tile; in the adjoint retain h + (drive + W (gain h))."""
    # Loads that do not wait for W come first.
    # (ROWS, UNITS)
    mask = rows.running[:, None] & tile.exists[None, :]
    at = rows.before[:, None] + tile.unit[None, :]
    own = tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
    retain = tl.load(w.retain + tile.unit, mask=tile.exists, other=0.0)[None, :]
    z = _drive(rows, tile, inputs, w, sizes, form)
    z += _neighbours(rows, tile, w, sizes, form)
    if w.bias is not None:
        z += tl.load(w.bias + tile.unit, mask=tile.exists, other=0.0)[None, :]
    if form.ADJOINT:
        fresh = z
    else:
        leak = tl.load(w.leak + tile.unit, mask=tile.exists, other=0.0)[None, :]
        fresh = leak * _activate(z, form.ACTIVATION)
    return tl.fma(tl.broadcast_to(retain, (form.ROWS, form.UNITS)), own, fresh)

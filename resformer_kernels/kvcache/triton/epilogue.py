"""What follows the softmax over a cache: see `attention.epilogue`. All of it is in float32.

The value at a query's own position is read from the cache again, once the keys are done with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from resformer_kernels._triton.device import widen
from resformer_kernels._triton.views import Coefficient, coefficient_of
from resformer_kernels.attention.triton.loads import row_cells
from resformer_kernels.kvcache.record import KVCacheCall
from resformer_kernels.kvcache.triton.codes import PLAIN, decoded
from resformer_kernels.kvcache.triton.places import is_open, load_codes, load_scales, place_of


class Epilogue(NamedTuple):
    """out_gate and exclusive, a number for each row or for all; without a gate, no pointer."""

    exclusive: Coefficient
    gate: Coefficient
    least: float
    """Of the square of the norm of a value."""
    EXCLUDES: Any
    CHANNELS: Any
    """Whether the gate has a number for each channel."""


def epilogue_of(call: KVCacheCall) -> Epilogue | None:
    """That of a call, or None: a plain call is compiled without any."""
    if not call.excludes and call.out_gate is None:
        return None
    gate = coefficient_of(call.out_gate, 1.0)
    return Epilogue(
        coefficient_of(call.exclusive, call.exclusive_value),
        gate,
        call.exclusive_eps**2,
        tl.constexpr(call.excludes),
        tl.constexpr(gate.column != 0),
    )


@triton.jit
def _own_values(cache, at, rows, geometry):
    """(ROWS, BLOCK), dequantised: the value at the position of each row's query; zeros where that
    is before the first key, or masked."""
    keys = at.shift + rows // geometry.GROUP
    inside = is_open(cache.mask, at.sequence, keys, (rows < at.count) & (keys >= 0))
    place = place_of(cache.v.pool, at.sequence, keys, inside)
    own = widen(decoded(load_codes(cache.v, at.head, place), tl.float32, cache.v.STORED))
    if cache.v.STORED != PLAIN:
        own = own * load_scales(cache.v, at.head, place)[:, None]
    return own


@triton.jit
def finished(y, epilogue, cache, geometry, at, rows):
    """out of rows whose softmax gave y (ROWS, BLOCK)."""
    inside = rows < at.count
    if epilogue.EXCLUDES:
        own = _own_values(cache, at, rows, geometry)
        size = tl.maximum(tl.sum(own * own, 1), epilogue.least)
        part = tl.math.div_rn(tl.sum(y * own, 1), size)
        if epilogue.exclusive.pointer is None:
            part = part * epilogue.exclusive.number
        else:
            cells = row_cells(epilogue.exclusive, at, rows, geometry.GROUP)
            part = part * widen(tl.load(cells, mask=inside, other=0.0))
        y = y - part[:, None] * own
    gate = epilogue.gate
    if gate.pointer is not None:
        cells = row_cells(gate, at, rows, geometry.GROUP)
        if epilogue.CHANNELS:
            columns = tl.arange(0, cache.v.BLOCK)
            mask = inside[:, None] & (columns < cache.v.WIDTH)[None, :]
            cells = cells[:, None] + columns[None, :] * gate.column
            factor = widen(tl.load(cells, mask=mask, other=0.0))
        else:
            factor = widen(tl.load(cells, mask=inside, other=0.0))[:, None]
        y = factor * y
    return y

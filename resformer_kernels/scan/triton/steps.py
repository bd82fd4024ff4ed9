"""Device functions that the scan's kernels share, and the tuples of their arguments.

A program serves BLOCK channels of one chunk of steps of one track, one step after another: tracks,
chunks and channels run in parallel. A track is a batch entry, or all packed rows, in which the
state is replaced where a sequence begins. Steps i = 0, 1, ... are in the order of the kernel,
whatever the rows' order in memory (REVERSED). STEPS of them are loaded before the first is
processed.

A value is a pair of tiles (BLOCK,), real and imaginary part; for real numbers the first counts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton import device
from resformer_kernels._triton.specialise import Stride

# Bits of `Packing.kinds`.
INSIDE: tl.constexpr = tl.constexpr(1)
FIRST: tl.constexpr = tl.constexpr(2)
LAST: tl.constexpr = tl.constexpr(4)


class View(NamedTuple):
    """(track, time, channels) by strides in elements, those of a complex number being two."""

    pointer: Tensor | None
    track: Stride
    time: Stride


class Packing(NamedTuple):
    """Position of each packed row in its sequence, and the number of that sequence."""

    kinds: Tensor | None
    owners: Tensor | None


class Work(NamedTuple):
    """How a scan is split. `chunk` counts steps, `width` channels."""

    packing: Packing
    time: int
    width: Stride
    chunk: int
    chunks: int
    column_tiles: int
    COMPLEX: tl.constexpr
    REVERSED: tl.constexpr
    STEPS: tl.constexpr
    BLOCK: tl.constexpr
    WINDOW: tl.constexpr


class Place(NamedTuple):
    """Channels of one program, and its steps [begin, end)."""

    track: Any
    number: Any
    """Chunk of its track."""
    index: Any
    """Chunk, counted over all tracks."""
    begin: Any
    end: Any
    columns: Any  # (BLOCK,)
    mask: Any  # (BLOCK,)


class Step(NamedTuple):
    """One step: its row in memory, and its position in its sequence."""

    row: Any
    exists: Any
    inside: Any
    """Whether the row belongs to a sequence."""
    enters: Any
    leaves: Any
    owner: Any


@triton.jit
def place_of(work, words):
    """The place of this program. Where programs wait for those of earlier chunks, they take places
    in the order in which they start, by the ticket in `words`: earlier chunks first."""
    program = tl.program_id(0)
    if words is not None:
        program = tl.atomic_add(words, 1, sem="relaxed").to(tl.int32)
    lanes = tl.num_programs(0) // work.chunks
    number = program // lanes
    lane = program % lanes
    track = lane // work.column_tiles
    columns = lane % work.column_tiles * work.BLOCK + tl.arange(0, work.BLOCK)
    begin = number * work.chunk
    end = min(begin + work.chunk, work.time)
    index = track * work.chunks + number
    return Place(track, number, index, begin, end, columns, columns < work.width)


@triton.jit
def row_number(work, i):
    """The row of step `i`, which may be a Python number in the interpreter."""
    return tl.full((), 0, tl.int64) + (work.time - 1 - i if work.REVERSED else i)


@triton.jit
def step_of(work, place, i):
    """Step `i`, which may lie past the end of the chunk."""
    exists = i < place.end
    row = row_number(work, i)
    if work.packing.kinds is not None:
        kind = tl.load(work.packing.kinds + row, mask=exists, other=0)
        owner = tl.load(work.packing.owners + row, mask=exists, other=0)
        inside = (kind & INSIDE) != 0
        enters = (kind & (LAST if work.REVERSED else FIRST)) != 0
        leaves = (kind & (FIRST if work.REVERSED else LAST)) != 0
    else:
        owner = place.track
        inside = exists
        enters = i == 0
        leaves = i == work.time - 1
    return Step(row, exists, inside, enters, leaves, owner)


@triton.jit
def zeros(place):
    """A value of zero."""
    zero = tl.zeros(place.columns.shape, tl.float32)
    return zero, zero


@triton.jit
def load(work, place, at, mask, other):
    """Channels of the row at `at` in float32; `other` (real) outside the mask."""
    columns = place.columns
    if work.COMPLEX:
        count: tl.constexpr = 2 * columns.shape[0]
        pairs = tl.reshape(tl.join(2 * columns, 2 * columns + 1), (count,))
        both = tl.load(at + pairs, mask=tl.reshape(tl.join(mask, mask), (count,)), other=0.0)
        re, im = tl.split(tl.reshape(both, (columns.shape[0], 2)))
        re = tl.where(mask, re, other)
    else:
        re = device.widen(tl.load(at + columns, mask=mask, other=other))
        im = re
    return re, im


@triton.jit
def store(work, place, at, mask, value):
    """Channels of the row at `at` become `value`, rounded."""
    columns = place.columns
    if work.COMPLEX:
        count: tl.constexpr = 2 * columns.shape[0]
        pairs = tl.reshape(tl.join(2 * columns, 2 * columns + 1), (count,))
        both = tl.reshape(tl.join(value[0], value[1]), (count,))
        tl.store(at + pairs, both, mask=tl.reshape(tl.join(mask, mask), (count,)))
    else:
        tl.store(at + columns, device.round_to(value[0], at.dtype.element_ty), mask=mask)


@triton.jit
def row_at(view, place, row):
    """Pointer to a row of a tensor of tokens' shape."""
    return view.pointer + place.track.to(tl.int64) * view.track + row * view.time


@triton.jit
def row_of(view, work, place, step, other):
    """The step's row of a tensor of tokens' shape, `other` outside sequences; zeros where there is
    no tensor."""
    if view.pointer is not None:
        value = load(work, place, row_at(view, place, step.row), place.mask & step.inside, other)
    else:
        value = zeros(place)
    return value


@triton.jit
def state_at(rows, work, index):
    """Pointer to row `index` of (rows, width) states."""
    return rows + index.to(tl.int64) * work.width * (2 if work.COMPLEX else 1)


@triton.jit
def state_of(rows, work, place, index, mask):
    """Row `index` of (rows, width) states; zeros where there are none."""
    if rows is not None:
        value = load(work, place, state_at(rows, work, index), mask, 0.0)
    else:
        value = zeros(place)
    return value


@triton.jit
def first_state(initial, work, place):
    """The state before a track's first step. Packed sequences replace it where they begin."""
    if work.packing.kinds is not None:
        value = zeros(place)
    else:
        value = state_of(initial, work, place, place.track, place.mask)
    return value


@triton.jit
def entered(states, work, place, step, h):
    """h, or the state with which a packed sequence begins at this step. A branch, as few begin."""
    if step.enters:
        h = state_of(states, work, place, step.owner, place.mask)
    return h


@triton.jit
def load_steps(view, gates, work, place, start):
    """STEPS rows of `view` and of `gates`, each (0, 1) outside sequences."""
    loaded = ()
    for u in tl.static_range(work.STEPS):
        step = step_of(work, place, start + u)
        loaded += (row_of(view, work, place, step, 0.0), row_of(gates, work, place, step, 1.0))
    return loaded


@triton.jit
def gate_of(constant, loaded, step):
    """The step's gate: the constant one, 1 past the chunk's end, or the one that was loaded."""
    if constant is not None:
        gate = (tl.where(step.exists, constant[0], 1.0), tl.where(step.exists, constant[1], 0.0))
    else:
        gate = loaded
    return gate


@triton.jit
def select(condition, a, b):
    """a where the condition holds, else b."""
    return tl.where(condition, a[0], b[0]), tl.where(condition, a[1], b[1])


@triton.jit
def fma(a, b, c, COMPLEX: tl.constexpr):
    """a * b + c."""
    if COMPLEX:
        re = tl.fma(a[0], b[0], tl.fma(-a[1], b[1], c[0]))
        im = tl.fma(a[0], b[1], tl.fma(a[1], b[0], c[1]))
    else:
        re = tl.fma(a[0], b[0], c[0])
        im = re
    return re, im


@triton.jit
def conj_mul(a, b, COMPLEX: tl.constexpr):
    """conj(a) * b."""
    if COMPLEX:
        re = tl.fma(a[0], b[0], a[1] * b[1])
        im = tl.fma(a[0], b[1], -a[1] * b[0])
    else:
        re = a[0] * b[0]
        im = re
    return re, im

"""What programs of the reservoir's kernel tell one another between steps and between sweeps.

Threads of a program hold copies of a small tile, and of a number: each loads it, one stores it. So
where a program reads what it will overwrite, a barrier comes between. Without one, a thread that is
late would read the new value, take another branch than the rest, and miss their barriers.

The rules are those of `csrc/reservoir/reservoir_plan.h`: a chunk whose start is not its left
neighbour's end runs again from that end, until it meets what is stored. All of it is decided on the
device; the host reads nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.launch import empty
from resformer_kernels.reservoir.triton.plan import Plan
from resformer_kernels.reservoir.triton.steps import CHECK_EVERY, Sizes

WIDE: tl.constexpr = tl.constexpr(1024)
"""Units compared at once."""
MANY: tl.constexpr = tl.constexpr(128)
"""Chunks, or tiles of them, looked at together."""

# Places in `Sweeps.control`.
COUNT: tl.constexpr = tl.constexpr(0)
LONGEST: tl.constexpr = tl.constexpr(1)
FORGOT: tl.constexpr = tl.constexpr(2)
SWEPT: tl.constexpr = tl.constexpr(3)

REGROWN: tl.constexpr = tl.constexpr(3.0)
"""`kRegrown` of reservoir_plan.h: a reservoir whose trajectories part again by this factor counts
as one that does not forget."""


class Sweeps(NamedTuple):
    """Memory that programs share. Everything from `ended` on is None unless time is split."""

    counter: Tensor
    """int64: arrivals, which only grow."""
    control: Tensor
    order: Tensor
    """Chunks of this sweep."""
    start: Tensor
    """(chunks, units): the state that each starts from."""
    ended: Tensor | None = None
    """(unit tiles, chunks): whether each chunk is over, in the account of each tile's program."""
    met: Tensor | None = None
    """Whether each chunk met its stored trajectory."""
    work: Tensor | None = None
    """Steps of all sweeps but the first."""
    apart: Tensor | None = None
    mismatch: Tensor | None = None
    """Differences accepted."""
    before: Tensor | None = None
    """The largest of `apart` in the sweep before."""
    nearest: Tensor | None = None
    """How near each chunk came to what is stored, in this sweep."""
    parted: Tensor | None = None
    """Whether it went away again."""
    exact: Tensor | None = None
    """Whether it has the bits of the sequential mode; used where starts are not forgotten."""
    partial: Tensor | None = None
    """(2, unit tiles, 2, chunks): largest difference and state of each tile, of two steps."""
    alive: Tensor | None = None


def make_sweeps(like: Tensor, sizes: Sizes, count: Tensor, plan: Plan, chunked: bool) -> Sweeps:
    """Memory before the first sweep, in which every chunk starts from zero."""
    rows = sizes.rows

    def integers() -> Tensor:
        return like.new_zeros((rows,), dtype=torch.int32)

    one = count.new_ones(())
    sweeps = Sweeps(
        counter=like.new_zeros((1,), dtype=torch.int64),
        control=torch.stack([count, plan.steps.amax().long(), one, one]).int(),
        order=torch.arange(rows, device=like.device, dtype=torch.int32),
        start=like.new_zeros((rows, sizes.units)),
    )
    if not chunked:
        return sweeps
    return sweeps._replace(
        ended=like.new_zeros((sizes.unit_tiles, rows), dtype=torch.int32),
        met=integers(),
        work=integers(),
        apart=like.new_zeros((rows,)),
        mismatch=like.new_zeros((rows,)),
        before=like.new_full((1,), torch.inf),
        nearest=like.new_full((rows,), torch.inf),
        parted=integers(),
        exact=(plan.number == 0).int(),
        partial=empty(like, (2, sizes.unit_tiles, 2, rows)),
        alive=integers(),
    )


def info_of(plan: Plan, count: Tensor, sweeps: Sweeps) -> Tensor:
    """The op's info, after the launch."""
    steps = plan.steps.sum()
    one = torch.ones_like(steps, dtype=torch.float64)
    some = (count > 0).to(torch.float64)
    if sweeps.work is None or sweeps.mismatch is None:
        return torch.stack([count * one, some, one * 0, one, one])
    done = (steps + sweeps.work.sum()).double() / steps.clamp(min=1)
    work = torch.where(steps > 0, done, one)
    swept, forgot = sweeps.control[SWEPT.value] * some, sweeps.control[FORGOT.value]
    mismatch = sweeps.mismatch.amax().double()
    return torch.stack([count * one, swept, mismatch, work, forgot.double()])


class Chunks(NamedTuple):
    """The ROWS chunks of one tile, in this sweep's order."""

    tile: Any
    row: Any
    exists: Any
    steps: Any


@triton.jit
def meet(counter, goal):
    """Wait until `goal` arrivals are counted: then all see what any program stored before."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    arrived = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while arrived < goal:
        arrived = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def met_stored(t, chunks, unit_tile, sweeps, sizes, tolerance, RELATIVE: tl.constexpr):
    """Which chunks met their stored trajectories at the step before t, or earlier.

    The tile of the first units keeps account of it for the sweeps that follow.
    """
    row, exists, steps = chunks.row, chunks.exists, chunks.steps
    first = unit_tile == 0
    own = sweeps.ended + unit_tile * sizes.rows + row
    if t == 0:
        tl.store(own, tl.zeros(row.shape, tl.int32), mask=exists)
        tl.debug_barrier()
    # (ROWS,)
    ended = tl.load(own, mask=exists, other=0, cache_modifier=".cg") != 0
    every = t % CHECK_EVERY == 0
    checked = exists & (t > 0) & (t <= steps) & (every | (t == steps)) & (ended == 0)
    met = ended
    if (tl.max(checked.to(tl.int32)) > 0) & (first | every):
        apart = tl.zeros(row.shape, tl.float32)
        largest = apart + 1.0
        partial = sweeps.partial + (t + 1) % 2 * (2 * sizes.unit_tiles * sizes.rows) + row
        for i in range(sizes.unit_tiles):
            at = partial + 2 * i * sizes.rows
            d = tl.load(at, mask=checked, other=0.0, cache_modifier=".cg")
            size = tl.load(at + sizes.rows, mask=checked, other=0.0, cache_modifier=".cg")
            apart = tl.maximum(apart, d)
            largest = tl.maximum(largest, size)
        if RELATIVE:
            limit = tolerance * largest
        else:
            limit = tolerance + tl.zeros_like(largest)
        now = checked & (apart <= limit) & (apart < float("inf"))
        over = now | (checked & (t == steps))
        met = ended | now
        if first:
            _account(t, row, checked, apart, now, over, sweeps)
        # All threads have loaded `ended` before one stores it.
        tl.debug_barrier()
        tl.store(own, tl.full(row.shape, 1, tl.int32), mask=over)
    if first & every:
        alive = exists & (met == 0) & (t < steps)
        tl.store(sweeps.alive + chunks.tile, tl.sum(alive.to(tl.int32)))
    return met


@triton.jit
def _account(t, row, checked, apart, now, over, sweeps):
    """Store what later sweeps want to know of the chunks that were `checked`."""
    at = sweeps.nearest + row
    nearest = tl.load(at, mask=checked, other=float("inf"), cache_modifier=".cg")
    work = tl.load(sweeps.work + row, mask=over, other=0, cache_modifier=".cg")
    parted = checked & (apart > REGROWN * nearest) & (apart < float("inf"))
    # All threads have loaded both before one stores them.
    tl.debug_barrier()
    tl.store(sweeps.parted + row, tl.full(row.shape, 1, tl.int32), mask=parted)
    tl.store(at, apart, mask=checked & (apart < nearest))
    tl.store(sweeps.met + row, now.to(tl.int32), mask=over)
    tl.store(sweeps.work + row, work + t, mask=over)


@triton.jit
def compare(t, chunks, due, tile, unit_tile, stored, h, sweeps, sizes):
    """Store how far a tile's h is from the stored trajectory, for the chunks that are `due`."""
    # (ROWS, UNITS)
    mask = due[:, None] & tile.exists[None, :]
    before = tl.load(stored, mask=mask, other=0.0)
    d = tl.where(mask, tl.abs(h - before), 0.0)
    # A NaN, or an infinite distance, has not met.
    d = tl.where(d < float("inf"), d, float("inf"))
    size = tl.where(mask, tl.abs(h), 0.0)
    place = t % 2 * sizes.unit_tiles + unit_tile
    to = sweeps.partial + 2 * place * sizes.rows + chunks.row
    tl.store(to, tl.max(d, 1), mask=due)
    tl.store(to + sizes.rows, tl.max(size, 1), mask=due)
    # All threads have loaded the stored trajectory before h takes its place.
    tl.debug_barrier()


@triton.jit
def _last(plan, sizes, chunk, mask):
    """The states' row of a chunk's last step, int64."""
    first = tl.load(plan.first + chunk, mask=mask, other=0)
    steps = tl.load(plan.steps + chunk, mask=mask, other=0)
    return first + (steps - 1) * sizes.direction


@triton.jit
def disagreements(states, plan, sweeps, sizes, accepted, RELATIVE: tl.constexpr):
    """Store how far each chunk's start is from its left neighbour's end; -1 where it may stay."""
    for chunk in range(tl.program_id(0), sizes.rows, tl.num_programs(0)):
        steps = tl.load(plan.steps + chunk)
        index = tl.load(plan.number + chunk)
        apart = tl.full((), -1.0, tl.float32)
        left = tl.full((), 0.0, tl.float32)
        if (index > 0) & (steps > 0):
            mine = sweeps.start + (tl.full((), 0, tl.int64) + chunk) * sizes.units
            theirs = states + _last(plan, sizes, chunk - 1, True) * sizes.units
            # (WIDE,)
            far = tl.zeros((WIDE,), tl.float32)
            size = far + 1.0
            other = tl.zeros((WIDE,), tl.int32)
            for begin in range(0, sizes.units, WIDE):
                unit = begin + tl.arange(0, WIDE)
                mask = unit < sizes.units
                a = tl.load(mine + unit, mask=mask, other=0.0, cache_modifier=".cg")
                b = tl.load(theirs + unit, mask=mask, other=0.0, cache_modifier=".cg")
                d = tl.abs(a - b)
                same = a.to(tl.int32, bitcast=True) == b.to(tl.int32, bitcast=True)
                # The same bits are the same, NaN or not.
                d = tl.where(same, 0.0, tl.where(d < float("inf"), d, float("inf")))
                other = tl.where(same, other, 1)
                far = tl.maximum(far, d)
                size = tl.maximum(size, tl.abs(b))
            if tl.max(other) > 0:
                farthest = tl.max(far)
                limit = accepted * tl.max(size) if RELATIVE else accepted
                forgets = tl.load(sweeps.met + chunk, cache_modifier=".cg") != 0
                stays = forgets & (farthest <= limit) & (farthest < float("inf"))
                apart = tl.where(stays, -1.0, farthest)
                left = tl.where(stays, farthest, 0.0)
        tl.store(sweeps.apart + chunk, apart)
        tl.store(sweeps.mismatch + chunk, left)


@triton.jit
def choose(swept, plan, sweeps, sizes):
    """By one program: choose the chunks that run again, and tell whether starts are forgotten."""
    forgot = tl.load(sweeps.control + FORGOT, cache_modifier=".cg")
    before = tl.load(sweeps.before, cache_modifier=".cg")
    # All threads have loaded both before one stores them.
    tl.debug_barrier()
    largest = 0.0
    found = 0
    parted = 0
    for base in range(0, sizes.rows, MANY):
        # (MANY,)
        chunk = base + tl.arange(0, MANY)
        exists = chunk < sizes.rows
        apart = tl.load(sweeps.apart + chunk, mask=exists, other=-1.0, cache_modifier=".cg")
        largest = tl.maximum(largest, tl.max(apart))
        found += tl.sum((apart >= 0.0).to(tl.int32))
        far = tl.load(sweeps.parted + chunk, mask=exists, other=0, cache_modifier=".cg")
        parted += tl.sum(far)
    # Starts that come no nearer from one sweep to the next are not forgotten within a chunk.
    nearer = largest < 0.5 * before
    forgot = tl.where((swept > 1) & (nearer == 0) & (found > 0), 0, forgot)
    forgot = tl.where(parted > 0, 0, forgot)
    tl.store(sweeps.before, largest)
    count = 0
    longest = 0
    for base in range(0, sizes.rows, MANY):
        chunk = base + tl.arange(0, MANY)
        exists = chunk < sizes.rows
        apart = tl.load(sweeps.apart + chunk, mask=exists, other=-1.0, cache_modifier=".cg")
        again = apart >= 0.0
        if forgot == 0:
            # Chunks then run in order, once, to the bits of the sequential mode: of each sequence
            # the first that may differ from it by a bit.
            index = tl.load(plan.number + chunk, mask=exists, other=0)
            some = tl.load(plan.steps + chunk, mask=exists, other=0) > 0
            exact = tl.load(sweeps.exact + chunk, mask=exists, other=1, cache_modifier=".cg")
            again = exists & some & (exact == 0)
            tl.store(sweeps.mismatch + chunk, tl.zeros((MANY,), tl.float32), mask=exists)
            for back in range(1, tl.max(index) + 1):
                inside = again & (index >= back)
                at = sweeps.exact + chunk - back
                earlier = tl.load(at, mask=inside, other=1, cache_modifier=".cg")
                again = again & (earlier != 0)
        ones = again.to(tl.int32)
        tl.store(sweeps.order + count + tl.cumsum(ones, 0) - ones, chunk, mask=again)
        farthest = tl.full((MANY,), float("inf"), tl.float32)
        tl.store(sweeps.nearest + chunk, farthest, mask=again)
        steps = tl.load(plan.steps + chunk, mask=again, other=0)
        count += tl.sum(ones)
        longest = tl.maximum(longest, tl.max(steps))
    tl.store(sweeps.control + COUNT, count)
    tl.store(sweeps.control + LONGEST, longest)
    tl.store(sweeps.control + FORGOT, forgot)
    tl.store(sweeps.control + SWEPT, swept)


@triton.jit
def correct(states, count, plan, sweeps, sizes):
    """Make the starts of the chunks that run again their left neighbours' ends."""
    forgot = tl.load(sweeps.control + FORGOT, cache_modifier=".cg")
    for place in range(tl.program_id(0), count, tl.num_programs(0)):
        chunk = tl.load(sweeps.order + place, cache_modifier=".cg")
        if forgot == 0:
            tl.store(sweeps.exact + chunk, 1)
        to = sweeps.start + chunk.to(tl.int64) * sizes.units
        source = states + _last(plan, sizes, chunk - 1, True) * sizes.units
        for begin in range(0, sizes.units, WIDE):
            unit = begin + tl.arange(0, WIDE)
            mask = unit < sizes.units
            end = tl.load(source + unit, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(to + unit, end, mask=mask)


@triton.jit
def count_alive(row_tiles, sweeps):
    """Chunks that neither met their stored trajectories nor ended."""
    total = 0
    for base in range(0, row_tiles, MANY):
        tile = base + tl.arange(0, MANY)
        alive = tl.load(sweeps.alive + tile, mask=tile < row_tiles, other=0, cache_modifier=".cg")
        total += tl.sum(alive)
    return total

"""The Triton kernel of the reservoir: every sweep over every chunk of time, in one launch.

Its programs are all resident (a cooperative launch) and wait for one another after every step. A
program has the same tiles in every step of a sweep, each ROWS chunks of time by UNITS units. The
rules are those of `csrc/reservoir/reservoir_plan.h`: a chunk that starts from another state than
its left neighbour ends in runs again from that one, until it meets what is stored. All of it is
decided here; the host asks for nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels.reservoir.triton.steps import CHECK_EVERY, Rows, next_states, tile_at

WIDE: tl.constexpr = tl.constexpr(1024)
"""Units that are compared at once."""
MANY: tl.constexpr = tl.constexpr(128)
"""Chunks, or tiles of them, that are looked at together."""

# What `Sweeps.control` holds.
COUNT: tl.constexpr = tl.constexpr(0)
LONGEST: tl.constexpr = tl.constexpr(1)
FORGOT: tl.constexpr = tl.constexpr(2)
SWEPT: tl.constexpr = tl.constexpr(3)

REGROWN: tl.constexpr = tl.constexpr(3.0)
"""`kRegrown` of reservoir_plan.h: a reservoir whose trajectories part again by so much counts as
one that does not forget."""


@triton.jit
def _meet(counter, goal):
    """Wait until `goal` arrivals were counted: what any program stored before, all now see."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
    arrived = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while arrived < goal:
        arrived = tl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def _met(t, row, there, steps, row_tile, first, sweeps, sizes, tolerance, RELATIVE: tl.constexpr):
    """Which rows met their stored trajectories at the step before t, or earlier.

    The tile of the first units keeps account of it.
    """
    ended = tl.load(sweeps.ended + row, mask=there, other=1, cache_modifier=".cg") != 0
    every = t % CHECK_EVERY == 0
    checked = there & (t > 0) & (t <= steps) & (every | (t == steps)) & (ended == 0)
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
        met = ended | now
        if first:
            at = sweeps.nearest + row
            nearest = tl.load(at, mask=checked, other=float("inf"), cache_modifier=".cg")
            parted = checked & (apart > REGROWN * nearest) & (apart < float("inf"))
            tl.store(sweeps.parted + row, tl.full(row.shape, 1, tl.int32), mask=parted)
            tl.store(at, apart, mask=checked & (apart < nearest))
            over = now | (checked & (t == steps))
            tl.store(sweeps.ended + row, tl.full(row.shape, 1, tl.int32), mask=over)
            tl.store(sweeps.met + row, now.to(tl.int32), mask=over)
            work = tl.load(sweeps.work + row, mask=over, other=0)
            tl.store(sweeps.work + row, work + t, mask=over)
    if first & every:
        alive = there & (met == 0) & (t < steps)
        tl.store(sweeps.alive + row_tile, tl.sum(alive.to(tl.int32)))
    return met


@triton.jit
def _compare(states, h, at, checks, wide, row, number, t, sweeps, sizes):
    """How far h is from what is stored, for the rows of `checks`."""
    mask = checks[:, None] & wide[None, :]
    stored = tl.load(states + at, mask=mask, other=0.0)
    d = tl.where(mask, tl.abs(h - stored), 0.0)
    # NaN, and what is infinitely far, has not met.
    d = tl.where(d < float("inf"), d, float("inf"))
    size = tl.where(mask, tl.abs(h), 0.0)
    place = t % 2 * sizes.unit_tiles + number
    to = sweeps.partial + 2 * place * sizes.rows + row
    tl.store(to, tl.max(d, 1), mask=checks)
    tl.store(to + sizes.rows, tl.max(size, 1), mask=checks)


@triton.jit
def _last(plan, sizes, chunk, mask):
    """Which row of the states is the last of a chunk; int64."""
    first = tl.load(plan.first + chunk, mask=mask, other=0)
    steps = tl.load(plan.steps + chunk, mask=mask, other=0)
    return first + (steps - 1) * sizes.direction


@triton.jit
def _disagreements(states, plan, sweeps, sizes, accepted, RELATIVE: tl.constexpr):
    """For each chunk how far its start is from its neighbour's end; -1 where it may stay."""
    for chunk in range(tl.program_id(0), sizes.rows, tl.num_programs(0)):
        steps = tl.load(plan.steps + chunk)
        index = tl.load(plan.place + chunk)
        apart = tl.full((), -1.0, tl.float32)
        kept = tl.full((), 0.0, tl.float32)
        if (index > 0) & (steps > 0):
            mine = sweeps.start + (tl.full((), 0, tl.int64) + chunk) * sizes.units
            theirs = states + _last(plan, sizes, chunk - 1, True) * sizes.units
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
                kept = tl.where(stays, farthest, 0.0)
        tl.store(sweeps.apart + chunk, apart)
        tl.store(sweeps.kept + chunk, kept)


@triton.jit
def _choose(swept, plan, sweeps, sizes):
    """One program: which chunks run again, and whether anything is forgotten."""
    largest = 0.0
    found = 0
    parted = 0
    for base in range(0, sizes.rows, MANY):
        chunk = base + tl.arange(0, MANY)
        there = chunk < sizes.rows
        apart = tl.load(sweeps.apart + chunk, mask=there, other=-1.0, cache_modifier=".cg")
        largest = tl.maximum(largest, tl.max(apart))
        found += tl.sum((apart >= 0.0).to(tl.int32))
        far = tl.load(sweeps.parted + chunk, mask=there, other=0, cache_modifier=".cg")
        parted += tl.sum(far)
    forgot = tl.load(sweeps.control + FORGOT, cache_modifier=".cg")
    # Starts that come no nearer from one sweep to the next are not forgotten within a chunk.
    nearer = largest < 0.5 * tl.load(sweeps.before, cache_modifier=".cg")
    forgot = tl.where((swept > 1) & (nearer == 0) & (found > 0), 0, forgot)
    forgot = tl.where(parted > 0, 0, forgot)
    tl.store(sweeps.before, largest)
    count = 0
    longest = 0
    for base in range(0, sizes.rows, MANY):
        chunk = base + tl.arange(0, MANY)
        there = chunk < sizes.rows
        apart = tl.load(sweeps.apart + chunk, mask=there, other=-1.0, cache_modifier=".cg")
        again = apart >= 0.0
        if forgot == 0:
            # In order then, once, and to the bits of the sequential mode: of each sequence the
            # first chunk that may differ from it by a bit.
            index = tl.load(plan.place + chunk, mask=there, other=0)
            some = tl.load(plan.steps + chunk, mask=there, other=0) > 0
            exact = tl.load(sweeps.exact + chunk, mask=there, other=1, cache_modifier=".cg")
            again = there & some & (exact == 0)
            tl.store(sweeps.kept + chunk, tl.zeros((MANY,), tl.float32), mask=there)
            for back in range(1, tl.max(index) + 1):
                inside = again & (index >= back)
                at = sweeps.exact + chunk - back
                earlier = tl.load(at, mask=inside, other=1, cache_modifier=".cg")
                again = again & (earlier != 0)
        ones = again.to(tl.int32)
        tl.store(sweeps.order + count + tl.cumsum(ones, 0) - ones, chunk, mask=again)
        tl.store(sweeps.ended + chunk, tl.zeros((MANY,), tl.int32), mask=again)
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
def _correct(states, count, plan, sweeps, sizes):
    """The starts of the chunks that run again become their neighbours' ends."""
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
def _alive(row_tiles, sweeps):
    total = 0
    for base in range(0, row_tiles, MANY):
        tile = base + tl.arange(0, MANY)
        alive = tl.load(sweeps.alive + tile, mask=tile < row_tiles, other=0, cache_modifier=".cg")
        total += tl.sum(alive)
    return total


@triton.jit
def reservoir_kernel(
    inputs,
    gains,
    states,
    w,
    plan,
    sweeps,
    sizes,
    tolerance,
    accepted,
    KIND: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADJOINT: tl.constexpr,
    PROJECTED: tl.constexpr,
    CHUNKED: tl.constexpr,
    INDEPENDENT: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Trajectories meet within `tolerance`, starts are accepted within `accepted`.

    INDEPENDENT: no unit reads another. Without CHUNKED there is one sweep, and nothing is compared.
    """
    programs = tl.num_programs(0)
    goal = tl.full((), 0, tl.int64)
    swept = 0
    count = tl.load(sweeps.control + COUNT)
    longest = tl.load(sweeps.control + LONGEST)
    while count > 0:
        again = swept > 0
        # Nothing is below that: where nothing is forgotten, chunks run to their ends.
        forgot = tl.load(sweeps.control + FORGOT, cache_modifier=".cg")
        near = tl.where(forgot == 0, -1.0, tolerance)
        row_tiles = (count + ROWS - 1) // ROWS
        # What the last step compared is looked at in another one.
        stop = longest + tl.where(again, 1, 0)
        t = 0
        while t < stop:
            for number in range(tl.program_id(0), row_tiles * sizes.unit_tiles, programs):
                row_tile, unit_tile = number // sizes.unit_tiles, number % sizes.unit_tiles
                tile = tile_at(unit_tile, sizes, UNITS)
                place = row_tile * ROWS + tl.arange(0, ROWS)
                there = place < count
                row = tl.load(sweeps.order + place, mask=there, other=0, cache_modifier=".cg")
                steps = tl.load(plan.steps + row, mask=there, other=0)
                running = there & (t < steps)
                if CHUNKED and again:
                    met = _met(
                        t,
                        row,
                        there,
                        steps,
                        row_tile,
                        tile.first,
                        sweeps,
                        sizes,
                        near,
                        not ADJOINT,
                    )
                    running = running & (met == 0)
                if tl.max(running.to(tl.int32)) > 0:
                    step = tl.load(plan.first + row, mask=there, other=0) + t * sizes.direction
                    given = tl.load(plan.input + row, mask=there, other=0)
                    at_start = sweeps.start + row.to(tl.int64) * sizes.units
                    before = states + (step - sizes.direction) * sizes.units
                    index = tl.load(plan.place + row, mask=there, other=0)
                    rows = Rows(
                        running,
                        tl.where(t == 0, at_start, before),
                        gains + (step - sizes.direction) * sizes.units if ADJOINT else before,
                        (index > 0) | (t > 0),
                        given + t * sizes.input_step,
                    )
                    h = next_states(
                        rows,
                        tile,
                        inputs,
                        w,
                        sizes,
                        KIND,
                        ACTIVATION,
                        ADJOINT,
                        PROJECTED,
                        SPLIT,
                        ROWS,
                        UNITS,
                    )
                    at = step[:, None] * sizes.units + tile.unit[None, :]
                    if CHUNKED and again:
                        due = ((t + 1) % CHECK_EVERY == 0) | (t + 1 == steps)
                        checks = running & due
                        if tl.max(checks.to(tl.int32)) > 0:
                            _compare(
                                states, h, at, checks, tile.wide, row, unit_tile, t, sweeps, sizes
                            )
                    tl.store(states + at, h, mask=running[:, None] & tile.wide[None, :])
            if INDEPENDENT:
                tl.debug_barrier()
            else:
                goal += programs
                _meet(sweeps.counter, goal)
            t += 1
            if CHUNKED and again & (t > 1) & ((t - 1) % CHECK_EVERY == 0):
                t = tl.where(_alive(row_tiles, sweeps) == 0, stop, t)
        swept += 1
        if CHUNKED:
            _disagreements(states, plan, sweeps, sizes, accepted, not ADJOINT)
            goal += programs
            _meet(sweeps.counter, goal)
            if tl.program_id(0) == 0:
                _choose(swept, plan, sweeps, sizes)
            goal += programs
            _meet(sweeps.counter, goal)
            count = tl.load(sweeps.control + COUNT, cache_modifier=".cg")
            longest = tl.load(sweeps.control + LONGEST, cache_modifier=".cg")
            _correct(states, count, plan, sweeps, sizes)
            goal += programs
            _meet(sweeps.counter, goal)
        else:
            count = count * 0

"""The reservoir's Triton kernel: every sweep over every chunk of time, in one launch.

The programs are all resident (a cooperative launch) and wait for one another after every step. A
program has the same tiles in every step of a sweep, each ROWS chunks of time by UNITS units. The
host reads nothing back: chunks, sweeps and their end are decided on the device, and the info stays
there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.available import interpreted
from resformer_kernels._triton.launch import (
    MOST_REGISTERS,
    capability,
    empty,
    launch,
    multiprocessors,
)
from resformer_kernels.reservoir.record import (
    IDENTITY,
    AdjointCall,
    ReservoirCall,
    info_of_no_steps,
)
from resformer_kernels.reservoir.triton.plan import plan_chunks
from resformer_kernels.reservoir.triton.steps import (
    CHECK_EVERY,
    CSR,
    DEPTH,
    Form,
    Rows,
    Sizes,
    Weights,
    next_states,
    tile_at,
)
from resformer_kernels.reservoir.triton.sweeps import (
    COUNT,
    FORGOT,
    LONGEST,
    Chunks,
    choose,
    compare,
    correct,
    count_alive,
    disagreements,
    info_of,
    make_sweeps,
    meet,
    met_stored,
)
from resformer_kernels.reservoir.triton.weight import (
    Weight,
    packed_projection,
    packed_weight,
    read_weight,
    transposed,
)

# Shares of the tolerance: within which a start is accepted, and trajectories meet. Less than 1, for
# a remaining difference may grow for a while before it goes.
_ACCEPTED, _MEETING = 0.5, 0.125

_MOST_PARTS = 8
_MOST_ROWS, _MOST_UNITS, _LEAST_UNITS = 16, 32, 8


class Limits(NamedTuple):
    """Differences within which trajectories meet, and a start is accepted."""

    meeting: float | Tensor
    accepted: float | Tensor


@triton.jit
def reservoir_kernel(inputs, gains, states, w, plan, sweeps, sizes, limits, form):
    """`limits` are numbers; in the adjoint pointers to them, in the gradient's units."""
    if form.ADJOINT:
        meeting, accepted = tl.load(limits.meeting), tl.load(limits.accepted)
    else:
        meeting, accepted = limits.meeting, limits.accepted
    programs = tl.num_programs(0)
    goal = tl.full((), 0, tl.int64)
    swept = 0
    count = tl.load(sweeps.control + COUNT)
    longest = tl.load(sweeps.control + LONGEST)
    while count > 0:
        again = swept > 0
        # Nothing is below -1: where starts are not forgotten, chunks run to their ends.
        forgot = tl.load(sweeps.control + FORGOT, cache_modifier=".cg")
        near = tl.where(forgot == 0, -1.0, meeting)
        row_tiles = (count + form.ROWS - 1) // form.ROWS
        # The last step's comparison is looked at in one step more.
        stop = longest + tl.where(again, 1, 0)
        t = 0
        while t < stop:
            for number in range(tl.program_id(0), row_tiles * sizes.unit_tiles, programs):
                row_tile, unit_tile = number // sizes.unit_tiles, number % sizes.unit_tiles
                tile = tile_at(unit_tile, sizes, form.UNITS)
                # (ROWS,)
                place = row_tile * form.ROWS + tl.arange(0, form.ROWS)
                exists = place < count
                row = tl.load(sweeps.order + place, mask=exists, other=0, cache_modifier=".cg")
                steps = tl.load(plan.steps + row, mask=exists, other=0)
                chunks = Chunks(row_tile, row, exists, steps)
                running = exists & (t < steps)
                if form.CHUNKED and again:
                    met = met_stored(t, chunks, unit_tile, sweeps, sizes, near, not form.ADJOINT)
                    running = running & (met == 0)
                if tl.max(running.to(tl.int32)) > 0:
                    step = tl.load(plan.first + row, mask=exists, other=0) + t * sizes.direction
                    given = tl.load(plan.input + row, mask=exists, other=0)
                    at_start = sweeps.start + row.to(tl.int64) * sizes.units
                    before = states + (step - sizes.direction) * sizes.units
                    index = tl.load(plan.number + row, mask=exists, other=0)
                    rows = Rows(
                        running,
                        tl.where(t == 0, at_start, before),
                        gains + (step - sizes.direction) * sizes.units if form.ADJOINT else before,
                        (index > 0) | (t > 0),
                        given + t * sizes.input_step,
                    )
                    # (ROWS, UNITS)
                    h = next_states(rows, tile, inputs, w, sizes, form)
                    at = states + (step[:, None] * sizes.units + tile.unit[None, :])
                    if form.CHUNKED and again:
                        due = running & (((t + 1) % CHECK_EVERY == 0) | (t + 1 == steps))
                        if tl.max(due.to(tl.int32)) > 0:
                            compare(t, chunks, due, tile, unit_tile, at, h, sweeps, sizes)
                    tl.store(at, h, mask=running[:, None] & tile.exists[None, :])
            if form.INDEPENDENT:
                tl.debug_barrier()
            else:
                goal += programs
                meet(sweeps.counter, goal)
            t += 1
            if form.CHUNKED and again & (t > 1) & ((t - 1) % CHECK_EVERY == 0):
                t = tl.where(count_alive(row_tiles, sweeps) == 0, stop, t)
        swept += 1
        if form.CHUNKED:
            disagreements(states, plan, sweeps, sizes, accepted, not form.ADJOINT)
            goal += programs
            meet(sweeps.counter, goal)
            if tl.program_id(0) == 0:
                choose(swept, plan, sweeps, sizes)
            goal += programs
            meet(sweeps.counter, goal)
            count = tl.load(sweeps.control + COUNT, cache_modifier=".cg")
            longest = tl.load(sweeps.control + LONGEST, cache_modifier=".cg")
            correct(states, count, plan, sweeps, sizes)
            goal += programs
            meet(sweeps.counter, goal)
        else:
            count = count * 0


class Tiling(NamedTuple):
    """A program's tile, and the number of programs."""

    rows: int
    units: int
    programs: int


def _programs(device: torch.device) -> int:
    """One per multiprocessor; the interpreter runs programs in turn, which could not wait."""
    return 1 if device.type == "cpu" and interpreted() else multiprocessors(device)


def tiling(chunks: int, groups: int, size: int, programs: int) -> Tiling:
    """Tiles large enough to reuse what they read, and small enough for every multiprocessor."""
    rows = min(_MOST_ROWS, 1 << (max(1, chunks) - 1).bit_length())
    units = min(_MOST_UNITS, max(_LEAST_UNITS, 1 << (size - 1).bit_length()))

    def tiles() -> int:
        return -(-max(1, chunks) // rows) * groups * -(-size // units)

    while units > _LEAST_UNITS and 2 * tiles() <= programs:
        units //= 2
    return Tiling(rows, units, min(programs, tiles()))


def _split(size: int) -> int:
    """Parts of the sum over k: by a group's size alone, so that no bits depend on the rows."""
    parts = 1
    while parts < _MOST_PARTS and 2 * parts * DEPTH.value <= size:
        parts *= 2
    return parts


def _run(
    call: ReservoirCall,
    weight: Weight,
    gains: Tensor | None,
    states: Tensor,
    tolerance: float | Tensor,
) -> Tensor:
    """Fill `states` by one recurrence, the adjoint where there are gains; returns the info."""
    inputs, projection, adjoint = call.inputs, call.input_weight, gains is not None
    groups, size = weight.groups, weight.size
    units = groups * size
    plan, owner, count, chunked = plan_chunks(call, weight, reverse=adjoint)
    chunks = owner.shape[0]
    tile = tiling(chunks, groups, size, _programs(inputs.device))
    split = _split(size)
    part = -(-size // (split * DEPTH.value)) * DEPTH.value
    tiles = -(-size // tile.units)
    padded = -(-tiles * tile.units // DEPTH.value) * DEPTH.value
    direction = -1 if adjoint else 1
    sizes = Sizes(
        units=units,
        size=size,
        padded=padded,
        width=groups * padded,
        part=part,
        inputs=inputs.shape[-1],
        input_step=inputs.stride(-2) * direction,
        direction=direction,
        unit_tiles=groups * tiles,
        rows=chunks,
    )
    weights = Weights(
        weight=packed_weight(weight, padded, split * part),
        rows=weight.rows,
        columns=weight.columns,
        input_weight=None if projection is None else packed_projection(projection, groups, padded),
        retain=(1.0 - call.leak).expand(units).contiguous(),
        leak=None if adjoint else call.leak.expand(units).contiguous(),
        bias=None if call.bias is None else call.bias.contiguous(),
    )
    sweeps = make_sweeps(inputs, sizes, count, plan, chunked)
    if call.initial_state is not None:
        first = (plan.number == 0)[:, None]
        start = torch.where(first, call.initial_state[owner], sweeps.start)
        sweeps = sweeps._replace(start=start)
    form = Form(
        KIND=tl.constexpr(weight.kind),
        ACTIVATION=tl.constexpr(call.activation),
        ADJOINT=tl.constexpr(adjoint),
        PROJECTED=tl.constexpr(projection is not None),
        CHUNKED=tl.constexpr(chunked),
        INDEPENDENT=tl.constexpr(weight.independent and not chunked),
        SPLIT=tl.constexpr(split),
        ROWS=tl.constexpr(tile.rows),
        UNITS=tl.constexpr(tile.units),
    )
    launch(
        reservoir_kernel,
        (tile.programs,),
        inputs.device,
        inputs=inputs,
        gains=gains,
        states=states,
        w=weights,
        plan=plan,
        sweeps=sweeps,
        sizes=sizes,
        limits=Limits(tolerance * _MEETING, tolerance * _ACCEPTED),
        form=form,
        num_warps=8 if tile.rows * tile.units >= 256 else 4,
        # On 12.x the third stage is what spills a register.
        num_stages=2 if capability(inputs.device) >= (12, 0) else 3,
        maxnreg=MOST_REGISTERS if weight.kind == CSR.value else None,
        launch_cooperative_grid=True,
    )
    return info_of(plan, count, sweeps)


def _states_like(inputs: Tensor, units: int, cu_seqlens: Tensor | None) -> Tensor:
    states = empty(inputs, (*inputs.shape[:-1], units))
    # Zeros where a step belongs to no sequence.
    return states if cu_seqlens is None else states.zero_()


def _final(call: ReservoirCall, states: Tensor) -> Tensor:
    """The state that each sequence ends in: its initial one where it has no steps."""
    if call.cu_seqlens is None:
        return states[:, -1].clone() if states.shape[1] > 0 else call.start().clone()
    if states.shape[0] == 0 or call.sequences == 0:
        return call.start().clone()
    last = (call.cu_seqlens[1:].long() - 1).clamp(0, states.shape[0] - 1)
    return torch.where((call.cu_seqlens.diff() > 0)[:, None], states[last], call.start())


def forward(call: ReservoirCall) -> tuple[Tensor, Tensor, Tensor]:
    """The implementation of `op.FORWARD`."""
    states = _states_like(call.inputs, call.units, call.cu_seqlens)
    if states.numel() == 0 or call.sequences == 0:
        return states, _final(call, states), info_of_no_steps(states)
    weight = read_weight(call.weight, call.rows, call.columns)
    info = _run(call, weight, None, states, call.tolerance)
    return states, _final(call, states), info


def adjoint(call: AdjointCall) -> tuple[Tensor, Tensor]:
    """The implementation of `op.ADJOINT`."""
    found = _states_like(call.grad, call.grad.shape[-1], call.cu_seqlens)
    scan = ReservoirCall(
        inputs=call.grad,
        weight=call.weight,
        rows=call.rows,
        columns=call.columns,
        input_weight=None,
        leak=call.leak,
        bias=None,
        initial_state=None,
        activation=IDENTITY,
        mode=call.mode,
        tolerance=0.0,
        cu_seqlens=call.cu_seqlens,
    )
    if found.numel() == 0 or scan.sequences == 0:
        return found, info_of_no_steps(found)
    weight = transposed(read_weight(call.weight, call.rows, call.columns))
    return found, _run(scan, weight, call.slope, found, call.tolerance.float())

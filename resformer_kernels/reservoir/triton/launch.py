"""The reservoir on Triton: weights packed, a plan and its scratch, one launch.

The host reads nothing back: chunks, sweeps and their end are decided on the device, and the `info`
that tells of them stays there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from resformer_kernels._triton.arch import multiprocessors
from resformer_kernels._triton.launch import empty, launch
from resformer_kernels.reservoir.triton import plan as planning
from resformer_kernels.reservoir.triton.kernels import reservoir_kernel
from resformer_kernels.reservoir.triton.steps import DEPTH, GROUPS
from resformer_kernels.reservoir.triton.weight import Weight, read_weight, transposed

# Shares of the tolerance: within which a start is accepted, and trajectories meet. Less than 1, for
# what is left of a difference may grow for a while before it goes.
_ACCEPTED, _MEETING = 0.5, 0.125
_MOST_PARTS = 8
_MOST_ROWS, _MOST_UNITS, _LEAST_UNITS = 16, 32, 8
_IDENTITY = 2


class Weights(NamedTuple):
    """What all steps share. Matrices are packed: k by padded units."""

    weight: Tensor
    rows: Tensor | None
    columns: Tensor | None
    input_weight: Tensor | None
    keep: Tensor
    amplitude: Tensor | None
    bias: Tensor | None


class Sizes(NamedTuple):
    """Numbers of the kernel."""

    units: int
    size: int
    """Units of a group."""
    padded: int
    """The same, in whole tiles."""
    width: int
    """Padded units of all groups."""
    part: int
    """Neighbours that one part of the sum over k has."""
    inputs: int
    input_step: int
    direction: int
    """1, or -1 back in time."""
    unit_tiles: int
    rows: int
    """Chunks at most."""


class Sweeps(NamedTuple):
    """What programs tell one another. Those from `ended` on are there where time is cut."""

    counter: Tensor
    control: Tensor
    order: Tensor
    start: Tensor
    ended: Tensor | None
    met: Tensor | None
    work: Tensor | None
    apart: Tensor | None
    kept: Tensor | None
    before: Tensor | None
    nearest: Tensor | None
    """How near each chunk came to what was stored, in this sweep."""
    parted: Tensor | None
    """Whether it went away again."""
    exact: Tensor | None
    """Whether it has the bits of the sequential mode; kept where nothing is forgotten."""
    partial: Tensor | None
    alive: Tensor | None


class Tiling(NamedTuple):
    """A program's tile, and how many programs there are."""

    rows: int
    units: int
    programs: int


class Problem(NamedTuple):
    """One recurrence; `gains` makes it the adjoint."""

    inputs: Tensor
    gains: Tensor | None
    weight: Weight
    input_weight: Tensor | None
    leak: Tensor
    bias: Tensor | None
    start: Tensor | None
    cu_seqlens: Tensor | None
    activation: int
    mode: int
    tolerance: float


def _programs(device: torch.device) -> int:
    """One a multiprocessor; the interpreter's programs run one after another, and cannot wait."""
    return 1 if device.type == "cpu" else multiprocessors(device)


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
    """Parts of the sum over k: by the size of a group alone, so that no bits depend on the rows."""
    parts = 1
    while parts < _MOST_PARTS and 2 * parts * DEPTH.value <= size:
        parts *= 2
    return parts


def _packed_weight(weight: Weight, padded: int, depth: int) -> Tensor:
    if weight.kind != GROUPS.value:
        return weight.values.float().contiguous()
    values = weight.values if weight.values.dim() == 3 else weight.values[None]
    size = values.shape[-1]
    return pad(values.mT, (0, padded - size, 0, depth - size)).contiguous()


def _packed_projection(projection: Tensor, groups: int, padded: int) -> Tensor:
    size, inputs = projection.shape[0] // groups, projection.shape[1]
    depth = -inputs % DEPTH.value
    packed = pad(projection.float().view(groups, size, inputs), (0, depth, 0, padded - size))
    return packed.view(groups * padded, inputs + depth).T.contiguous()


def _vector(x: Tensor, units: int) -> Tensor:
    return x.expand(units).contiguous()


def _sweeps(like: Tensor, sizes: Sizes, count: Tensor, plan: planning.Plan, cut: bool) -> Sweeps:
    def whole(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return like.new_zeros(shape, dtype=dtype)

    rows = sizes.rows
    one = count.new_ones(())
    control = torch.stack([count, plan.steps.amax().long(), one, one]).int()
    order = torch.arange(rows, device=like.device, dtype=torch.int32)
    always = (whole(1, dtype=torch.int64), control, order, like.new_zeros((rows, sizes.units)))
    if not cut:
        return Sweeps(*always, *(None,) * 11)
    before = like.new_full((1,), torch.inf)
    integers = (whole(rows), whole(rows), whole(rows))
    numbers = (whole(rows, dtype=torch.float32), whole(rows, dtype=torch.float32), before)
    nearest = like.new_full((rows,), torch.inf, dtype=torch.float32)
    exact = (plan.place == 0).int()
    partial = empty(like, (2, sizes.unit_tiles, 2, rows))
    account = (nearest, whole(rows), exact)
    return Sweeps(*always, *integers, *numbers, *account, partial, whole(rows))


def _info(plan: planning.Plan, count: Tensor, sweeps: Sweeps) -> Tensor:
    steps = plan.steps.sum()
    one = torch.ones_like(steps, dtype=torch.float64)
    some = (count > 0).to(torch.float64)
    if sweeps.work is None or sweeps.kept is None:
        return torch.stack([count * one, some, one * 0, one, one])
    done = (steps + sweeps.work.sum()).double() / steps.clamp(min=1)
    work = torch.where(steps > 0, done, one)
    swept, forgot = sweeps.control[3] * some, sweeps.control[2]
    mismatch = sweeps.kept.amax().double()
    return torch.stack([count * one, swept, mismatch, work, forgot.double()])


def _plan(problem: Problem) -> tuple[planning.Plan, Tensor, Tensor, bool]:
    """(the plan, whose each chunk is, how many there are, whether time is cut)."""
    inputs, weight, mode = problem.inputs, problem.weight, problem.mode
    lengths = planning.lengths_of(inputs, problem.cu_seqlens)
    most = planning.most_chunks(weight.work)
    cut = planning.cuts(
        mode,
        weight.pays,
        most,
        sequences=lengths.start.shape[0],
        total=lengths.total,
        even=lengths.even,
    )
    mode = mode if cut else planning.SEQUENTIAL
    length = planning.chunk_length(lengths, mode, weight.pays, most)
    sequences = lengths.start.shape[0]
    chunks = planning.chunks_at_most(lengths, mode, most) if cut else sequences
    if problem.cu_seqlens is None:
        input_at = torch.arange(sequences, device=inputs.device) * inputs.stride(0)
    else:
        input_at = lengths.start * inputs.stride(0)
    reverse = problem.gains is not None
    made = planning.make_plan(lengths, length, chunks, input_at, inputs.stride(-2), reverse)
    return (*made, cut)


def _weights(problem: Problem, sizes: Sizes, depth: int) -> Weights:
    weight, projection, leak = problem.weight, problem.input_weight, problem.leak
    return Weights(
        _packed_weight(weight, sizes.padded, depth),
        weight.rows,
        weight.columns,
        None if projection is None else _packed_projection(projection, weight.groups, sizes.padded),
        _vector(1.0 - leak, sizes.units),
        None if problem.gains is not None else _vector(leak, sizes.units),
        None if problem.bias is None else problem.bias.contiguous(),
    )


def _run(problem: Problem, states: Tensor) -> Tensor:
    """Fills `states`; returns the info."""
    inputs, weight = problem.inputs, problem.weight
    groups, size, adjoint = weight.groups, weight.size, problem.gains is not None
    plan, owner, count, cut = _plan(problem)
    chunks = owner.shape[0]
    tile = tiling(chunks, groups, size, _programs(inputs.device))
    split = _split(size)
    part = -(-size // (split * DEPTH.value)) * DEPTH.value
    tiles = -(-size // tile.units)
    step = inputs.stride(-2)
    sizes = Sizes(
        units=groups * size,
        size=size,
        padded=tiles * tile.units,
        width=groups * tiles * tile.units,
        part=part,
        inputs=inputs.shape[-1],
        input_step=-step if adjoint else step,
        direction=-1 if adjoint else 1,
        unit_tiles=groups * tiles,
        rows=chunks,
    )
    sweeps = _sweeps(inputs, sizes, count, plan, cut)
    if problem.start is not None:
        first = (plan.place == 0)[:, None]
        start = torch.where(first, problem.start[owner], sweeps.start)
        sweeps = sweeps._replace(start=start)
    launch(
        reservoir_kernel,
        (tile.programs,),
        inputs.device,
        inputs=inputs,
        gains=problem.gains,
        states=states,
        w=_weights(problem, sizes, split * part),
        plan=plan,
        sweeps=sweeps,
        sizes=sizes,
        tolerance=problem.tolerance * _MEETING,
        accepted=problem.tolerance * _ACCEPTED,
        KIND=weight.kind,
        ACTIVATION=problem.activation,
        ADJOINT=adjoint,
        PROJECTED=problem.input_weight is not None,
        CHUNKED=cut,
        INDEPENDENT=weight.independent and not cut,
        SPLIT=split,
        ROWS=tile.rows,
        UNITS=tile.units,
        num_warps=8 if tile.rows * tile.units >= 256 else 4,
        num_stages=3,
        launch_cooperative_grid=True,
    )
    return _info(plan, count, sweeps)


def _states_like(inputs: Tensor, units: int, cu_seqlens: Tensor | None) -> Tensor:
    states = empty(inputs, (*inputs.shape[:-1], units))
    # Zeros for what belongs to no sequence.
    return states if cu_seqlens is None else states.zero_()


def _empty_info(like: Tensor) -> Tensor:
    return torch.stack([like.new_full((), x, dtype=torch.float64) for x in (0, 0, 0, 1, 1)])


def _final(states: Tensor, start: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The state that each sequence ends in: the one that it begins with where it has no steps."""
    if cu_seqlens is None:
        if states.shape[1] > 0:
            return states[:, -1].clone()
        nothing = states.new_zeros((states.shape[0], states.shape[-1]))
        return nothing if start is None else start.clone()
    sequences = cu_seqlens.shape[0] - 1
    nothing = states.new_zeros((sequences, states.shape[-1])) if start is None else start
    if states.shape[0] == 0 or sequences == 0:
        return nothing.clone()
    last = (cu_seqlens[1:].long() - 1).clamp(0, states.shape[0] - 1)
    return torch.where((cu_seqlens.diff() > 0)[:, None], states[last], nothing)


def forward(
    inputs: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    input_weight: Tensor | None,
    leak: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    activation: int,
    mode: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The implementation of the op: its arguments, in the schema's order."""
    read = read_weight(weight, rows, columns)
    states = _states_like(inputs, read.groups * read.size, cu_seqlens)
    info = _empty_info(inputs)
    if states.numel() > 0 and (cu_seqlens is None or cu_seqlens.shape[0] > 1):
        problem = Problem(
            inputs,
            None,
            read,
            input_weight,
            leak,
            bias,
            initial_state,
            cu_seqlens,
            activation,
            mode,
            tolerance,
        )
        info = _run(problem, states)
    return states, _final(states, initial_state, cu_seqlens), info


def adjoint(
    grad: Tensor,
    slope: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    leak: Tensor,
    cu_seqlens: Tensor | None,
    mode: int,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """The implementation of the op: its arguments, in the schema's order."""
    read = transposed(read_weight(weight, rows, columns))
    states = _states_like(grad, grad.shape[-1], cu_seqlens)
    if states.numel() == 0 or (cu_seqlens is not None and cu_seqlens.shape[0] == 1):
        return states, _empty_info(grad)
    problem = Problem(
        grad, slope, read, None, leak, None, None, cu_seqlens, _IDENTITY, mode, tolerance
    )
    return states, _run(problem, states)

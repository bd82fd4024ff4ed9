"""Reductions, stretch by stretch of time: what is held of one does not grow with time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.reservoir.op import FORWARD
from resformer_kernels.reservoir.reduction import sums_over_time

_ELEMENTS, _ELEMENTS_ON_GPU = 2**22, 2**26
"""States of one stretch, about: 16 MiB; a GPU takes more chunks at once, and has the memory."""
_SHORTEST = 4096
"""Steps: a shorter stretch would leave few chunks worth running at once."""


def stretch_length(elements_a_step: int, device: torch.device) -> int:
    """Steps of one stretch."""
    elements = _ELEMENTS_ON_GPU if device.type == "cuda" else _ELEMENTS
    return max(_SHORTEST, elements // max(1, elements_a_step))


def reduced(
    namespace: str,
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
    targets: Tensor | None,
    reduce: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `reservoir_scan_reduced`: (first, second, final state, info), by the scan
    of `namespace`."""
    scan = getattr(getattr(torch.ops, namespace), FORWARD).default
    units = leak_units(weight, rows)
    outputs = 0 if targets is None else targets.shape[-1]
    sequences = inputs.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = inputs.new_zeros((sequences, units)) if initial_state is None else initial_state.clone()
    wide = torch.float64
    sums = state.new_zeros((sequences, units), dtype=wide)
    gram = state.new_zeros((units, units), dtype=wide)
    cross = state.new_zeros((units, outputs), dtype=wide)
    wide_states = state.new_empty((0,), dtype=wide)
    infos: list[tuple[Tensor, int]] = []
    for stretch in _stretches(inputs, cu_seqlens, sequences, units):
        of, piece, offsets = stretch
        states, state[of], info = scan(
            inputs[piece],
            weight,
            rows,
            columns,
            input_weight,
            leak,
            bias,
            state[of].contiguous(),
            offsets,
            activation,
            mode,
            tolerance,
        )
        infos.append((info, states.numel()))
        if reduce == "mean":
            sums[of] += sums_over_time(states, offsets, wide)
        elif reduce == "gram":
            if states.numel() > wide_states.numel():
                wide_states = states.new_empty((states.numel(),), dtype=wide)
            steps = wide_states[: states.numel()].view(-1, units).copy_(states.flatten(0, -2))
            gram.addmm_(steps.T, steps)
            if targets is not None:
                cross.addmm_(steps.T, targets[piece].flatten(0, -2).double())
    info = _joined(infos, inputs)
    if reduce == "gram":
        return gram, cross, state, info
    if reduce == "last":
        return state.clone(), state.new_empty((0,)), state, info
    lengths = _lengths(inputs, cu_seqlens, sequences)
    return (sums / lengths[:, None]).to(state.dtype), state.new_empty((0,)), state, info


def leak_units(weight: Tensor, rows: Tensor | None) -> int:
    """N."""
    if rows is not None:
        return rows.shape[0] - 1
    return weight.shape[0] * (weight.shape[1] if weight.dim() == 3 else 1)


def _stretches(
    inputs: Tensor, cu_seqlens: Tensor | None, sequences: int, units: int
) -> Iterator[tuple[slice, Any, Tensor | None]]:
    """(sequences, where their steps lie in inputs, offsets if packed), in the order of time."""
    if cu_seqlens is None:
        length = stretch_length(sequences * units, inputs.device)
        for begin in range(0, inputs.shape[1], length):
            yield slice(0, sequences), (slice(None), slice(begin, begin + length)), None
        return
    length = stretch_length(units, inputs.device)
    offsets = cu_seqlens.tolist()
    first = 0
    while first < sequences:
        begin, after = offsets[first], first + 1
        if offsets[after] - begin > length:
            # Longer than a stretch: by itself, as a batch of one.
            for at in range(begin, offsets[after], length):
                end = min(at + length, offsets[after])
                yield slice(first, after), (None, slice(at, end)), None
        else:
            while after < sequences and offsets[after + 1] - begin <= length:
                after += 1
            inside = cu_seqlens[first : after + 1] - begin
            yield slice(first, after), slice(begin, offsets[after]), inside
        first = after


def _lengths(inputs: Tensor, cu_seqlens: Tensor | None, sequences: int) -> Tensor:
    if cu_seqlens is not None:
        return cu_seqlens.diff().clamp(min=1)
    return torch.full((sequences,), max(inputs.shape[1], 1), device=inputs.device)


def _joined(infos: list[tuple[Tensor, int]], like: Tensor) -> Tensor:
    """chunks added, sweeps and mismatch at their largest, work weighted by steps, forgot by all."""
    if not infos:
        return like.new_tensor([0, 0, 0, 1, 1], dtype=torch.float64)
    every = torch.stack([info for info, _ in infos])
    weights = every.new_tensor([size for _, size in infos])
    work = (every[:, 3] * weights).sum() / weights.sum().clamp(min=1)
    return torch.stack(
        [
            every[:, 0].sum(),
            every[:, 1].amax(),
            every[:, 2].amax(),
            work if weights.sum() > 0 else work + 1,
            every[:, 4].amin(),
        ]
    )

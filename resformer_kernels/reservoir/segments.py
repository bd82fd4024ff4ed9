"""Reductions segment by segment of time: memory does not grow with the number of steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.reservoir.op import FORWARD
from resformer_kernels.reservoir.record import ReducedCall, ReservoirCall, info_of_no_steps
from resformer_kernels.reservoir.reduction import sums_over_time

_ELEMENTS, _ELEMENTS_ON_GPU = 2**22, 2**26
"""States of one segment, about: 16 MiB; a GPU takes more chunks at once, and has the memory."""
_SHORTEST = 4096
"""Steps: a shorter segment would leave few chunks worth running at once."""


def segment_length(elements_per_step: int, device: torch.device) -> int:
    """Steps of one segment."""
    elements = _ELEMENTS_ON_GPU if device.type == "cuda" else _ELEMENTS
    return max(_SHORTEST, elements // max(1, elements_per_step))


def reduced(namespace: str, call: ReducedCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `reservoir_scan_reduced`: (first, second, final state, info), by the forward op of
    `namespace`."""
    scan, reduce, targets = call
    units = scan.units
    outputs = 0 if targets is None else targets.shape[-1]
    state = scan.start().clone()
    wide = torch.float64
    sums = torch.zeros_like(state, dtype=wide)
    rows = units if reduce == "gram" else 0
    gram = state.new_zeros((rows, units), dtype=wide)
    cross = state.new_zeros((rows, outputs), dtype=wide)
    wide_states = state.new_empty((0,), dtype=wide)
    infos: list[tuple[Tensor, int]] = []
    for sequences, steps, offsets in _segments(scan):
        segment = scan._replace(
            inputs=scan.inputs[steps],
            initial_state=state[sequences].contiguous(),
            cu_seqlens=offsets,
        )
        states, state[sequences], info = FORWARD(namespace, segment)
        infos.append((info, states.numel()))
        if reduce == "mean":
            sums[sequences] += sums_over_time(states, offsets, wide)
        elif reduce == "gram":
            if states.numel() > wide_states.numel():
                wide_states = states.new_empty((states.numel(),), dtype=wide)
            flat = wide_states[: states.numel()].view(-1, units).copy_(states.flatten(0, -2))
            gram.addmm_(flat.T, flat)
            if targets is not None:
                cross.addmm_(flat.T, targets[steps].flatten(0, -2).double())
    info = _joined(infos, state)
    if reduce == "gram":
        return gram, cross, state, info
    nothing = state.new_empty((0,))
    if reduce == "last":
        return state.clone(), nothing, state, info
    if scan.cu_seqlens is None:
        lengths = sums.new_full((), max(scan.inputs.shape[1], 1))
    else:
        lengths = scan.cu_seqlens.diff().clamp(min=1)[:, None]
    return (sums / lengths).to(state.dtype), nothing, state, info


def _segments(scan: ReservoirCall) -> Iterator[tuple[slice, Any, Tensor | None]]:
    """(sequences, where their steps lie in inputs, offsets if packed), in the order of time."""
    inputs, cu_seqlens, sequences = scan.inputs, scan.cu_seqlens, scan.sequences
    if cu_seqlens is None:
        length = segment_length(sequences * scan.units, inputs.device)
        for begin in range(0, inputs.shape[1], length):
            yield slice(0, sequences), (slice(None), slice(begin, begin + length)), None
        return
    length = segment_length(scan.units, inputs.device)
    # The host waits for a GPU here: which sequences go together, and the shapes of each segment,
    # depend on the offsets.
    offsets = cu_seqlens.tolist()
    first = 0
    while first < sequences:
        begin, after = offsets[first], first + 1
        if offsets[after] - begin > length:
            # Longer than a segment: by itself, as a batch of one.
            for at in range(begin, offsets[after], length):
                end = min(at + length, offsets[after])
                yield slice(first, after), (None, slice(at, end)), None
        else:
            while after < sequences and offsets[after + 1] - begin <= length:
                after += 1
            inside = cu_seqlens[first : after + 1] - begin
            yield slice(first, after), slice(begin, offsets[after]), inside
        first = after


def _joined(infos: list[tuple[Tensor, int]], like: Tensor) -> Tensor:
    """The info of all segments from (info, number of states) of each: chunks added, sweeps and
    mismatch at their largest, work weighted by states, forgot where all did."""
    total = sum(size for _, size in infos)
    if total == 0:
        return info_of_no_steps(like)
    every = torch.stack([info for info, _ in infos])
    work = torch.stack([info[3] * size for info, size in infos]).sum() / total
    return torch.stack(
        [every[:, 0].sum(), every[:, 1].amax(), every[:, 2].amax(), work, every[:, 4].amin()]
    )

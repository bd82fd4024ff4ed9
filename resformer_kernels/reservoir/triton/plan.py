"""The chunks of time that the Triton kernel steps at once, as tensors: the host reads nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from resformer_kernels.reservoir.record import AUTO, CHUNKED, SEQUENTIAL, ReservoirCall
from resformer_kernels.reservoir.triton.weight import Weight

SHORTEST = 16
"""Steps of a chunk that was asked for."""
WORTHWHILE = 256
"""Steps of a chunk that "auto" makes: what a reservoir forgets in, about."""
ASKED = 12
"""Pieces that a short sequence is split into where chunks were asked for."""
LEAST_CHUNKS, MOST_CHUNKS = 64, 512
BUSY = 2**26
"""Multiply-adds of one step that keep a GPU busy for longer than it waits between steps."""


class Plan(NamedTuple):
    """Chunks of time, those of a sequence one after another; spare ones have no steps."""

    steps: Tensor
    """int32."""
    number: Tensor
    """int32: number within its sequence."""
    first: Tensor
    """int64: the states' row of its first step."""
    input: Tensor
    """int64: offset of that step's inputs, in elements."""


def _lengths_of(call: ReservoirCall) -> tuple[Tensor, Tensor]:
    """(first row, steps) of each sequence, int64: all within the inputs, whatever `cu_seqlens`
    holds."""
    inputs = call.inputs
    if call.cu_seqlens is None:
        batch, steps = inputs.shape[:2]
        start = torch.arange(batch, device=inputs.device) * steps
        return start, torch.full_like(start, steps)
    offsets = call.cu_seqlens.long().clamp(0, inputs.shape[0])
    return offsets[:-1], offsets.diff().clamp(min=0)


def _may_split(call: ReservoirCall, weight: Weight, total: int, most: int) -> bool:
    """Whether time may be split, as far as shapes tell."""
    if call.mode != AUTO:
        return call.mode == CHUNKED
    even = call.cu_seqlens is None
    longest = total // max(1, call.sequences) if even else total
    return weight.pays and longest >= 2 * WORTHWHILE and (call.sequences < most or not even)


def _chunk_length(lengths: Tensor, mode: int, most: int) -> Tensor:
    """Steps of a chunk, int64 (): by lengths alone. At most `most` more chunks than sequences."""
    total, longest = lengths.sum(), lengths.amax().clamp(min=1)
    if mode == SEQUENTIAL:
        return longest
    fair = (total + most - 1) // most
    if mode == CHUNKED:
        piece = ((total + ASKED - 1) // ASKED).clamp(max=WORTHWHILE)
        return torch.maximum(fair, piece).clamp(min=SHORTEST)
    return torch.where(longest >= 2 * WORTHWHILE, fair.clamp(min=WORTHWHILE), longest)


def plan_chunks(
    call: ReservoirCall, weight: Weight, *, reverse: bool
) -> tuple[Plan, Tensor, Tensor, bool]:
    """(the plan, the sequence of each chunk, the number of chunks, whether time may be split).

    `reverse`: back in time.
    """
    inputs, rows = call.inputs, call.inputs.shape[:-1].numel()
    start, lengths = _lengths_of(call)
    most = min(MOST_CHUNKS, max(LEAST_CHUNKS, BUSY // max(1, weight.work)))
    chunked = _may_split(call, weight, rows, most)
    length = _chunk_length(lengths, call.mode if chunked else SEQUENTIAL, most)
    chunks = call.sequences
    if chunked:
        chunks += min(most, rows // (SHORTEST if call.mode == CHUNKED else WORTHWHILE))
    counts = (lengths + length - 1) // length
    ends = counts.cumsum(0)
    chunk = torch.arange(chunks, device=inputs.device)
    owner = torch.searchsorted(ends, chunk, right=True).clamp(max=ends.shape[0] - 1)
    count, steps = counts[owner].clamp(min=1), lengths[owner]
    index = chunk - (ends[owner] - counts[owner])
    exists = chunk < ends[-1]
    # Equal ones, not a short one last.
    begin = steps * index // count
    taken = (steps * (index + 1) // count - begin) * exists
    at = (steps - 1 - begin if reverse else begin) * exists
    sequence_at = owner if call.cu_seqlens is None else start[owner]
    plan = Plan(
        steps=taken.int(),
        number=(index * exists).int(),
        first=start[owner] + at,
        input=sequence_at * inputs.stride(0) + at * inputs.stride(-2),
    )
    return plan, owner, ends[-1], chunked

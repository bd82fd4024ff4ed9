"""Which pieces of time the Triton kernel steps at once, as tensors: nothing is read by the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

AUTO, SEQUENTIAL, CHUNKED = range(3)
"""`mode`."""

SHORTEST = 16
"""Steps of a chunk that was asked for."""
WORTHWHILE = 256
"""Steps of a chunk that "auto" makes: what a reservoir forgets in, about."""
ASKED = 12
"""Into how many pieces a short sequence is cut where chunks were asked for."""
LEAST_CHUNKS, MOST_CHUNKS = 64, 512
BUSY = 2**26
"""Multiply-adds of one step that keep a GPU busy for longer than it waits between steps."""
PAYING = 1024
"""Entries of W: with fewer, a step is too short for many at once to help."""


class Plan(NamedTuple):
    """Chunks of time, those of a sequence one after another; what is left over has no steps."""

    steps: Tensor
    """int32."""
    place: Tensor
    """int32: which chunk of its sequence it is."""
    first: Tensor
    """int64: which row of the states its first step is."""
    input: Tensor
    """int64: where the inputs of that step are, in elements."""


class Lengths(NamedTuple):
    """Sequences, in steps."""

    start: Tensor
    """int64: of each sequence, among the rows of the states."""
    steps: Tensor
    """int64."""
    total: int
    """Rows of the states; packed sequences may have fewer steps."""
    even: bool
    """Whether all are of one length."""


def lengths_of(inputs: Tensor, cu_seqlens: Tensor | None) -> Lengths:
    """Whatever `cu_seqlens` holds, all of it lies within the inputs."""
    device = inputs.device
    if cu_seqlens is None:
        batch, steps = inputs.shape[:2]
        start = torch.arange(batch, device=device) * steps
        return Lengths(start, torch.full_like(start, steps), batch * steps, True)
    offsets = cu_seqlens.long().clamp(0, inputs.shape[0])
    return Lengths(offsets[:-1], offsets.diff().clamp(min=0), inputs.shape[0], False)


def most_chunks(work: int) -> int:
    """Into how many pieces time is cut at most, with so many multiply-adds a step of each."""
    return min(MOST_CHUNKS, max(LEAST_CHUNKS, BUSY // max(1, work)))


def cuts(
    mode: int, pays: bool, most: int, *, sequences: int, total: int, even: bool = True
) -> bool:
    """Whether time may be cut, as far as shapes tell: `total` steps, `even` if each sequence has as
    many as the others."""
    if mode != AUTO:
        return mode == CHUNKED
    longest = total // max(1, sequences) if even else total
    return pays and longest >= 2 * WORTHWHILE and (sequences < most or not even)


def chunk_length(lengths: Lengths, mode: int, pays: bool, most: int) -> Tensor:
    """Steps of a chunk, int64 (): by lengths alone. At most `most` more chunks than sequences."""
    total, longest = lengths.steps.sum(), lengths.steps.amax().clamp(min=1)
    fair = (total + most - 1) // most
    if mode == CHUNKED:
        piece = ((total + ASKED - 1) // ASKED).clamp(max=WORTHWHILE)
        return torch.maximum(fair, piece).clamp(min=SHORTEST)
    if mode == AUTO and pays:
        return torch.where(longest >= 2 * WORTHWHILE, fair.clamp(min=WORTHWHILE), longest)
    return longest


def chunks_at_most(lengths: Lengths, mode: int, most: int) -> int:
    """Sequences, and what `chunk_length` cuts more."""
    least = SHORTEST if mode == CHUNKED else WORTHWHILE
    return lengths.start.shape[0] + min(most, lengths.total // least)


def make_plan(
    lengths: Lengths,
    length: Tensor,
    chunks: int,
    input_at: Tensor,
    input_step: int,
    reverse: bool,
) -> tuple[Plan, Tensor, Tensor]:
    """(the plan of `chunks` chunks at most, whose each is, how many there are).

    `input_at`: where the inputs of each sequence begin, in elements; `reverse`: back in time.
    """
    device = length.device
    counts = (lengths.steps + length - 1) // length
    ends = counts.cumsum(0)
    chunk = torch.arange(chunks, device=device)
    owner = torch.searchsorted(ends, chunk, right=True).clamp(max=ends.shape[0] - 1)
    count, steps = counts[owner].clamp(min=1), lengths.steps[owner]
    index = chunk - (ends[owner] - counts[owner])
    there = chunk < ends[-1]
    # Equal ones, not a short one last.
    begin = steps * index // count
    taken = (steps * (index + 1) // count - begin) * there
    at = (steps - 1 - begin if reverse else begin) * there
    plan = Plan(
        taken.int(),
        (index * there).int(),
        lengths.start[owner] + at,
        input_at[owner] + at * input_step,
    )
    return plan, owner, ends[-1]

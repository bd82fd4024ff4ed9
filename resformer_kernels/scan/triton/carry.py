"""The state that enters each chunk of a scan: a summary of every chunk, then a pass over them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.launch import launch
from resformer_kernels.scan.triton import partition as split
from resformer_kernels.scan.triton import steps


@triton.jit
def summary_kernel(
    gates, constant, tokens, entered, products, ends, resets, work, BACKWARD: tl.constexpr
):
    """Summarise a chunk as a map of the state that enters it: state -> product * state + end.
    BACKWARD: for the recurrence c = conj(g) (x + c). `resets`: whether a sequence begins in the
    chunk, so that the entering state is lost."""
    place = steps.place_of(work)
    h = steps.zeros(place)
    product = (h[0] + 1.0, h[1])
    reset = 0
    gate = constant
    if constant is not None:
        gate = steps.load(work, place, constant, place.mask, 0.0)
    for start in range(place.begin, place.end, work.STEPS):
        loaded = steps.load_steps(tokens, gates, work, place, start)
        for u in tl.static_range(work.STEPS):
            step = steps.step_of(work, place, start + u)
            if work.packing.kinds is not None:
                first = steps.state_of(entered, work, place, step.owner, place.mask & step.enters)
                h = steps.select(step.enters, first, h)
                reset = tl.where(step.enters, 1, reset)
            x = loaded[2 * u]
            g = steps.gate_of(gate, loaded[2 * u + 1], step)
            if BACKWARD:
                h = steps.conj_mul(g, (h[0] + x[0], h[1] + x[1]), work.COMPLEX)
                product = steps.conj_mul(g, product, work.COMPLEX)
            else:
                h = steps.fma(g, h, x, work.COMPLEX)
                product = steps.fma(g, product, steps.zeros(place), work.COMPLEX)
    steps.store(work, place, steps.state_at(products, work, place.index), place.mask, product)
    steps.store(work, place, steps.state_at(ends, work, place.index), place.mask, h)
    if work.packing.kinds is not None:
        tl.store(resets + place.index, reset)


@triton.jit
def carry_kernel(products, ends, resets, entered, entering, work):
    """The state that enters each chunk of a track."""
    track = tl.program_id(0) // work.column_tiles
    columns = tl.program_id(0) % work.column_tiles * work.BLOCK + tl.arange(0, work.BLOCK)
    place = steps.Place(track, track * work.chunks, 0, work.chunks, columns, columns < work.width)
    h = steps.first_state(None, entered, work, place)
    for start in range(0, work.chunks, work.STEPS):
        loaded = ()
        for u in tl.static_range(work.STEPS):
            index, mask = place.index + start + u, place.mask & (start + u < work.chunks)
            loaded += (
                steps.state_of(products, work, place, index, mask),
                steps.state_of(ends, work, place, index, mask),
            )
        for u in tl.static_range(work.STEPS):
            exists = start + u < work.chunks
            index = place.index + start + u
            steps.store(work, place, steps.state_at(entering, work, index), place.mask & exists, h)
            end = loaded[2 * u + 1]
            # A product that overflowed does not affect a state of zero.
            lost = h[0] == 0.0
            if work.COMPLEX:
                lost = lost & (h[1] == 0.0)
            if work.packing.kinds is not None:
                lost = lost | (tl.load(resets + index, mask=exists, other=0) != 0)
            h = steps.select(lost, end, steps.fma(loaded[2 * u], h, end, work.COMPLEX))


def entering_states(
    gates: Tensor,
    tokens: steps.View,
    entered: Tensor | None,
    programs: int,
    work: steps.Work,
    *,
    backward: bool,
) -> Tensor | None:
    """The state that enters each chunk, given what enters the sequences; None for one chunk."""
    if work.chunks == 1:
        return None
    products, ends, entering = (
        split.new_states(gates, programs, work, torch.float32) for _ in range(3)
    )
    resets = None
    if work.packing.kinds is not None:
        resets = gates.new_empty(products.shape[:1], dtype=torch.int32)
    by_step, constant = split.gates_of(gates)
    summaries = {"products": products, "ends": ends, "resets": resets, "entered": entered}
    launch(
        summary_kernel,
        (programs,),
        gates.device,
        gates=by_step,
        constant=constant,
        tokens=tokens,
        work=work,
        BACKWARD=backward,
        num_warps=1,
        **summaries,
    )
    launch(
        carry_kernel,
        (programs // work.chunks,),
        gates.device,
        entering=entering,
        work=work,
        num_warps=1,
        **summaries,
    )
    return entering

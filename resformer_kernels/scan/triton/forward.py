"""The forward kernel of the scan, and its launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton import device as lib
from resformer_kernels.scan.record import ScanCall, state_dtype
from resformer_kernels.scan.triton import partition as split
from resformer_kernels.scan.triton.carry import entering_states
from resformer_kernels.scan.triton.steps import (
    fma,
    gate_of,
    load,
    load_steps,
    place_of,
    row_at,
    select,
    state_at,
    state_of,
    step_of,
    store,
    zeros,
)


@triton.jit
def forward_kernel(gates, constant, tokens, states, entering, initial, final, work):
    """h = g h + x. `entering`: the state before each chunk, where there are several."""
    place = place_of(work)
    if entering is not None:
        h = state_of(entering, work, place, place.index, place.mask)
    elif work.packing.kinds is not None:
        h = zeros(place)
    else:
        h = state_of(initial, work, place, place.track, place.mask)
    gate = constant
    if constant is not None:
        gate = load(work, place, constant, place.mask, 0.0)
    for start in range(place.begin, place.end, work.STEPS):
        loaded = load_steps(tokens, gates, work, place, start)
        for u in tl.static_range(work.STEPS):
            step = step_of(work, place, start + u)
            mask = place.mask & step.exists
            if work.packing.kinds is not None:
                entered = state_of(initial, work, place, step.owner, place.mask & step.enters)
                h = select(step.enters, entered, h)
            h = fma(gate_of(gate, loaded[2 * u + 1], step), h, loaded[2 * u], work.COMPLEX)
            at = row_at(states, place, step.row)
            if work.packing.kinds is not None:
                store(work, place, at, mask, select(step.inside, h, zeros(place)))
                store(work, place, state_at(final, work, step.owner), place.mask & step.leaves, h)
            else:
                store(work, place, at, mask, h)
    if work.packing.kinds is None:
        store(
            work,
            place,
            state_at(final, work, place.track),
            place.mask & (place.end == work.time),
            h,
        )


def forward(call: ScanCall) -> tuple[Tensor, Tensor]:
    """(states, final state)."""
    tokens, initial = call.tokens, split.flat(call.initial_state)
    states = lib.empty(tokens, tokens.shape)
    shape = (call.sequences, tokens.shape[-1])
    final = lib.empty(tokens, shape, state_dtype(tokens.dtype))
    if call.cu_seqlens is not None or tokens.shape[-2] == 0:
        # No program visits an empty sequence.
        final.zero_() if call.initial_state is None else final.copy_(call.initial_state)
    if states.numel() == 0 or call.sequences == 0:
        return states.zero_(), final
    parts, work = split.work_of(tokens, call.cu_seqlens, reverse=call.reverse)
    gates, constant = split.gates_of(call.gates)
    x = split.view_of(tokens)
    lib.launch(
        forward_kernel,
        (parts.programs,),
        tokens.device,
        gates=gates,
        constant=constant,
        tokens=x,
        states=split.view_of(states),
        entering=entering_states(call.gates, x, initial, parts, work, backward=False),
        initial=initial,
        final=split.parts_of(final),
        work=work,
        num_warps=1,
    )
    return states, final

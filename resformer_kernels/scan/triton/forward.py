"""The forward kernel of the scan, and its launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.launch import MOST_REGISTERS, empty, launch
from resformer_kernels.scan.record import ScanCall, state_dtype
from resformer_kernels.scan.triton import lookback, steps
from resformer_kernels.scan.triton import partition as split


@triton.jit
def forward_kernel(gates, constant, tokens, states, words, initial, final, work):
    """h = g h + x. `words`: those of `lookback`, where a chunk is what is loaded at once."""
    place = steps.place_of(work, words)
    h = steps.first_state(initial, work, place)
    gate = constant
    if constant is not None:
        gate = steps.load(work, place, constant, place.mask, 0.0)
    for start in range(place.begin, place.end, work.STEPS):
        loaded = steps.load_steps(tokens, gates, work, place, start)
        h, begin = lookback.state_before(words, h, loaded, gate, initial, work, place, start, False)
        for u in tl.static_range(work.STEPS):
            step = steps.step_of(work, place, begin + u)
            mask = place.mask & step.exists
            if work.packing.kinds is not None:
                h = steps.entered(initial, work, place, step, h)
            g = steps.gate_of(gate, loaded[2 * u + 1], step)
            h = steps.fma(g, h, loaded[2 * u], work.COMPLEX)
            at = steps.row_at(states, place, step.row)
            if work.packing.kinds is not None:
                steps.store(work, place, at, mask, steps.select(step.inside, h, steps.zeros(place)))
                last = place.mask & step.leaves
                steps.store(work, place, steps.state_at(final, work, step.owner), last, h)
            else:
                steps.store(work, place, at, mask, h)
    if work.packing.kinds is None:
        last = place.mask & (place.end == work.time)
        steps.store(work, place, steps.state_at(final, work, place.track), last, h)


def forward(call: ScanCall) -> tuple[Tensor, Tensor]:
    """(states, final state)."""
    tokens, initial = call.tokens, split.flat(call.initial_state)
    states = empty(tokens, tokens.shape)
    shape = (call.sequences, tokens.shape[-1])
    final = empty(tokens, shape, state_dtype(tokens.dtype))
    if call.cu_seqlens is not None or tokens.shape[-2] == 0:
        # No program visits an empty sequence.
        final.zero_() if call.initial_state is None else final.copy_(call.initial_state)
    if states.numel() == 0 or call.sequences == 0:
        return states.zero_(), final
    gates, constant = split.gates_of(call.gates)
    read = (tokens,) if constant is not None else (tokens, call.gates)
    programs, work = split.partition(tokens, call.cu_seqlens, read, reverse=call.reverse)
    launch(
        forward_kernel,
        (programs,),
        tokens.device,
        gates=gates,
        constant=constant,
        tokens=split.view_of(tokens),
        states=split.view_of(states),
        words=lookback.new_words(tokens, programs, work),
        initial=initial,
        final=split.parts_of(final),
        work=work,
        num_warps=1,
        maxnreg=MOST_REGISTERS,
    )
    return states, final

"""The backward kernel of the scan, and its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.launch import MOST_REGISTERS, empty, launch
from resformer_kernels.scan.op import WANTS_GATES, WANTS_INITIAL, WANTS_TOKENS, BackwardCall
from resformer_kernels.scan.triton import lookback, steps
from resformer_kernels.scan.triton import partition as split


@triton.jit
def backward_kernel(
    grad,
    gates,
    constant,
    states,
    d_tokens,
    d_gates,
    sums,
    words,
    d_final,
    initial,
    d_initial,
    work,
):
    """a = dh + c, dx = a, dg = conj(h before) a, c = conj(g) a. The state before a step is that of
    the row visited next; `states` is there where a gradient of the gates is wanted. `sums`: dg
    summed over a chunk, in float64, where gates are constant."""
    place = steps.place_of(work, words)
    c = steps.first_state(d_final, work, place)
    gate = constant
    if constant is not None:
        gate = steps.load(work, place, constant, place.mask, 0.0)
    sum_re = tl.zeros((work.BLOCK,), tl.float64)
    sum_im = tl.zeros((work.BLOCK,), tl.float64)
    for start in range(place.begin, place.end, work.STEPS):
        loaded = steps.load_steps(grad, gates, work, place, start)
        before = ()
        if states.pointer is not None:
            for u in tl.static_range(work.STEPS):
                step = steps.step_of(work, place, start + u)
                mask = place.mask & step.inside
                at = steps.row_at(states, place, steps.row_number(work, start + u + 1))
                left = steps.load(work, place, at, mask & ~step.leaves, 0.0)
                first = steps.state_of(initial, work, place, step.owner, mask & step.leaves)
                before += (steps.select(step.leaves, first, left),)
        c, begin = lookback.state_before(words, c, loaded, gate, d_final, work, place, start, True)
        for u in tl.static_range(work.STEPS):
            step = steps.step_of(work, place, begin + u)
            mask = place.mask & step.exists
            if work.packing.kinds is not None:
                c = steps.entered(d_final, work, place, step, c)
            x = loaded[2 * u]
            a = (c[0] + x[0], c[1] + x[1])
            if d_tokens.pointer is not None:
                at = steps.row_at(d_tokens, place, step.row)
                steps.store(work, place, at, mask, steps.select(step.inside, a, steps.zeros(place)))
            if states.pointer is not None:
                d = steps.conj_mul(before[u], a, work.COMPLEX)
                d = steps.select(step.inside, d, steps.zeros(place))
                if sums is not None:
                    sum_re += d[0].to(tl.float64)
                    sum_im += d[1].to(tl.float64)
                else:
                    steps.store(work, place, steps.row_at(d_gates, place, step.row), mask, d)
            c = steps.conj_mul(steps.gate_of(gate, loaded[2 * u + 1], step), a, work.COMPLEX)
            if work.packing.kinds is not None and d_initial is not None:
                last = place.mask & step.leaves
                steps.store(work, place, steps.state_at(d_initial, work, step.owner), last, c)
    if d_initial is not None and work.packing.kinds is None:
        last = place.mask & (place.end == work.time)
        steps.store(work, place, steps.state_at(d_initial, work, place.track), last, c)
    if sums is not None:
        at = steps.state_at(sums, work, place.index)
        if work.COMPLEX:
            tl.store(at + 2 * place.columns, sum_re, mask=place.mask)
            tl.store(at + 2 * place.columns + 1, sum_im, mask=place.mask)
        else:
            tl.store(at + place.columns, sum_re, mask=place.mask)


def backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of tokens, gates and initial_state; those not in grad_mask have no elements."""
    states, gates = call.states, call.gates
    wants_gates = bool(call.grad_mask & WANTS_GATES)
    d_tokens = empty(states, states.shape if call.grad_mask & WANTS_TOKENS else (0,))
    d_gates = empty(gates, gates.shape if wants_gates else (0,))
    d_initial = states.new_empty((0,))
    if call.grad_mask & WANTS_INITIAL:
        assert call.initial_state is not None
        d_initial = empty(call.initial_state, call.initial_state.shape)
        if call.cu_seqlens is not None or states.shape[-2] == 0:
            d_initial.zero_() if call.grad_final is None else d_initial.copy_(call.grad_final)
    if states.numel() == 0 or call.sequences == 0:
        return d_tokens.zero_(), d_gates.zero_(), d_initial
    by_step, constant = split.gates_of(gates)
    read = [states] * (1 + wants_gates) + ([gates] if constant is None else [])
    programs, work = split.partition(states, call.cu_seqlens, read, reverse=not call.reverse)
    grad, d_final = split.view_of(call.grad_states), split.flat(call.grad_final)
    sums = None
    if wants_gates and constant is not None:
        sums = split.new_states(gates, programs, work, torch.float64)
    launch(
        backward_kernel,
        (programs,),
        states.device,
        grad=grad,
        gates=by_step,
        constant=constant,
        states=split.view_of(states) if wants_gates else split.NO_VIEW,
        d_tokens=split.view_of(d_tokens) if call.grad_mask & WANTS_TOKENS else split.NO_VIEW,
        d_gates=split.view_of(d_gates) if wants_gates and sums is None else split.NO_VIEW,
        sums=sums,
        words=lookback.new_words(states, programs, work),
        d_final=d_final,
        initial=split.flat(call.initial_state),
        d_initial=split.parts_of(d_initial) if call.grad_mask & WANTS_INITIAL else None,
        work=work,
        num_warps=1,
        maxnreg=MOST_REGISTERS,
    )
    if sums is not None:
        total = split.parts_of(d_gates)
        total.copy_(sums.sum(0).view(total.shape))
    return d_tokens, d_gates, d_initial

"""The ops of the scan and its gradient: the scan of the conjugate gates, against time.

    a_t  = dh_t + conj(g_{t+1}) * a_{t+1},   a after the last step being the final state's gradient
    dx_t = a_t        dg_t = a_t * conj(h_{t-1})        dh_0 = conj(g_1) * a_1

Saved are the gates and, where their gradient is wanted, the states, which are the output.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core import gradient
from resformer_kernels._core.op import Op, vmap_error
from resformer_kernels._core.strides import with_unit_strides
from resformer_kernels.scan.record import SCAN, TENSORS, ScanCall, sequences_of, state_dtype

LEAVES = ("tokens", "gates", "initial_state")
WANTS_TOKENS, WANTS_GATES, WANTS_INITIAL = 1, 2, 4
"""Bits of `grad_mask`, in the order of LEAVES."""


class BackwardCall(NamedTuple):
    """The gradient of an output that nobody used is None. `states` are read where the gradient of
    the gates is wanted; otherwise any tensor of their shape and dtype serves."""

    grad_states: Tensor | None
    grad_final: Tensor | None
    gates: Tensor
    states: Tensor
    initial_state: Tensor | None
    reverse: bool
    cu_seqlens: Tensor | None
    grad_mask: int

    @property
    def sequences(self) -> int:
        """Number of sequences: the rows of a state."""
        return sequences_of(self.states, self.cu_seqlens)


def _forward_fake(call: ScanCall) -> tuple[Tensor, Tensor]:
    tokens = call.tokens
    shape = (call.sequences, tokens.shape[-1])
    return tokens.new_empty(tokens.shape), tokens.new_empty(shape, dtype=state_dtype(tokens.dtype))


def _backward_fake(call: BackwardCall) -> tuple[Tensor, ...]:
    initial = call.states if call.initial_state is None else call.initial_state
    return tuple(
        leaf.new_empty(leaf.shape if call.grad_mask >> bit & 1 else (0,))
        for bit, leaf in enumerate((call.states, call.gates, initial))
    )


FORWARD = Op(
    f"{SCAN}_forward",
    ScanCall,
    "(Tensor states, Tensor final_state)",
    function=SCAN,
    fake=_forward_fake,
    triton="resformer_kernels.scan.triton.forward:forward",
)
BACKWARD = Op(
    f"{SCAN}_backward",
    BackwardCall,
    "(Tensor dtokens, Tensor dgates, Tensor dinitial_state)",
    function=SCAN,
    fake=_backward_fake,
    triton="resformer_kernels.scan.triton.backward:backward",
)


class LinearScan(torch.autograd.Function):
    """apply(namespace, *call) -> (states, final state)."""

    @staticmethod
    @gradient.signed
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        # One parameter: torch binds the signature at every call.
        namespace, *call = arguments
        states, final = FORWARD(namespace, call)
        return states, final

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.namespace, gates, _tokens, initial_state, ctx.reverse, cu_seqlens = inputs
        states, _ = output
        if not ctx.needs_input_grad[1]:
            # The backward reads its shape and dtype alone, and checks that rows are contiguous.
            states = states.new_empty(states.shape[-1:]).expand(states.shape)
        ctx.save_for_backward(gates, states, initial_state, cu_seqlens)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_states: Tensor | None, grad_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gates, states, initial_state, cu_seqlens = ctx.saved_tensors
        needs = gradient.wanted(ctx, ScanCall, LEAVES)
        operands = (gates, states, initial_state, ctx.reverse, cu_seqlens)
        call = BackwardCall(grad_states, grad_final, *operands, gradient.mask_of(needs))
        call = with_unit_strides(call, ("grad_states", "grad_final"))
        gradients: tuple[Tensor | None, ...] = (None,) * len(LEAVES)
        if grad_states is not None or grad_final is not None:
            gradients = gradient.run_backward(BACKWARD, ctx.namespace, call)
        return gradient.in_place_of(ScanCall, LEAVES, gradients, needs)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(SCAN))


def run(namespace: str, call: ScanCall) -> tuple[Tensor, Tensor]:
    """(states, final state) by the ops of `namespace`, contiguous."""
    call = with_unit_strides(call, TENSORS)
    leaves = (call.gates, call.tokens, call.initial_state)
    if torch.compiler.is_compiling():
        call = gradient.distinct(call)
    else:
        gradient.refuse_forward_mode(SCAN, leaves)
    if gradient.wants_gradient(leaves):
        states, final = LinearScan.apply(namespace, *call)
    else:
        states, final = FORWARD(namespace, call)
    return states, final

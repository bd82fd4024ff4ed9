"""The gradient of the scan, around the ops of `ops.py`: the scan of the conjugate gates, backwards.

    a_t  = dh_t + conj(g_{t+1}) * a_{t+1},   a after the last step being the final state's gradient
    dx_t = a_t        dg_t = a_t * conj(h_{t-1})        dh_0 = conj(g_1) * a_1

The states, which are the output, are saved where a gradient of the gates is wanted, and nothing
else of their size but the gates themselves.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core.old import (
    copy_note,
    distinct,
    needs_copy,
    refuse_forward_mode,
    run_backward,
    unit_stride,
    vmap_error,
    wants_gradient,
)
from resformer_kernels.scan.op import SCAN, WANTS_GATES, WANTS_INITIAL, WANTS_TOKENS
from resformer_kernels.scan.record import ScanCall


def scan_op(namespace: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The forward op, on the arguments that `LinearScan.apply` takes."""
    op: Any = getattr(torch.ops, namespace).linear_scan_forward.default
    states, final = op(*arguments)
    return states, final


def _backward_op(namespace: str, *arguments: Any) -> tuple[Tensor, ...]:
    op: Any = getattr(torch.ops, namespace).linear_scan_backward.default
    found: tuple[Tensor, ...] = op(*arguments)
    return found


class LinearScan(torch.autograd.Function):
    """apply(namespace, gates, tokens, initial_state, cu_seqlens, reverse) -> (states, final)."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return scan_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.namespace, gates, _tokens, initial_state, cu_seqlens, ctx.reverse = inputs
        states, _ = output
        if not ctx.needs_input_grad[1]:
            # Its shape and dtype are all that the backward asks for.
            states = states.new_empty(()).expand(states.shape)
        ctx.save_for_backward(gates, states, initial_state, cu_seqlens)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_states: Tensor | None, grad_final: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _, gates_wanted, tokens_wanted, initial_wanted, _, _ = ctx.needs_input_grad
        if grad_states is None and grad_final is None:
            return (None,) * 6
        mask = (
            WANTS_TOKENS * tokens_wanted
            | WANTS_GATES * gates_wanted
            | WANTS_INITIAL * initial_wanted
        )
        given = [g if g is None else unit_stride(g) for g in (grad_states, grad_final)]
        d_tokens, d_gates, d_initial = run_backward(
            SCAN, _backward_op, ctx.namespace, *given, *ctx.saved_tensors, ctx.reverse, mask
        )
        return (
            None,
            d_gates if gates_wanted else None,
            d_tokens if tokens_wanted else None,
            d_initial if initial_wanted else None,
            None,
            None,
        )

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(SCAN))


def _leaves(call: ScanCall) -> list[tuple[str, Tensor | None]]:
    return [
        ("gates", call.gates),
        ("tokens", call.tokens),
        ("initial_state", call.initial_state),
        ("cu_seqlens", call.cu_seqlens),
    ]


def run_op(call: ScanCall, namespace: str) -> tuple[Tensor, Tensor]:
    """(states, final state), by the ops of `namespace`."""
    leaves: Any = tuple(x if x is None else unit_stride(x) for _, x in _leaves(call))
    if torch.compiler.is_compiling():
        leaves = distinct(leaves)
    else:
        refuse_forward_mode(SCAN, leaves)
    function: Any = LinearScan.apply if wants_gradient(leaves) else scan_op
    states, final = function(namespace, *leaves, call.reverse)
    return states, final


def copy_notes(call: ScanCall) -> list[str]:
    """What `run_op` does to the arguments before the kernel."""
    return [copy_note(name, x) for name, x in _leaves(call) if x is not None and needs_copy(x)]

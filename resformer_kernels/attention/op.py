"""The ops of value-residual attention and their gradient; torch alone is needed.

Both serve fixed-length (B, T, H, D) and packed (total, H, D) tensors; the latter come with
`cu_seqlens`. What was not asked for comes back with no elements. Saved for backward: the inputs,
out and lse, and what `epilogue` says. V' is never saved: backward mixes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core import strides
from resformer_kernels._core.gradient import (
    Parts,
    distinct,
    mask_of,
    refuse_forward_mode,
    run_backward,
    signed,
    wants_gradient,
)
from resformer_kernels._core.op import Op, vmap_error
from resformer_kernels.attention.epilogue import keeping
from resformer_kernels.attention.record import FIXED, LEAVES, AttentionCall

_ROWS = ("q", "k", "v", "v_first")
_COEFFICIENTS = ("lambda_v", "lambda_first")
_OFFSETS = ("cu_seqlens_q", "cu_seqlens_k")
"""Rows and offsets are copied where their last axis is not contiguous."""


class BackwardCall(NamedTuple):
    """The arguments of the backward op. Bit i of grad_mask: leaf i of `LEAVES` wants a gradient."""

    grad_out: Tensor
    grad_lse: Tensor | None
    grad_mixed: Tensor | None
    call: AttentionCall
    out: Tensor
    """Or the output before the gate, where `call.return_ungated`."""
    lse: Tensor
    along: Tensor | None
    grad_mask: int


def _forward_fake(call: AttentionCall) -> tuple[Tensor, ...]:
    q, value = call.q, call.value
    *batch, time, heads, _ = q.shape
    of_rows, of_out = (*batch, heads, time), (*q.shape[:-1], value.shape[-1])
    return (
        q.new_empty(of_out),
        q.new_empty(of_rows if call.return_lse else (0,), dtype=torch.float32),
        value.new_empty(value.shape if call.return_mixed_value else (0,)),
        q.new_empty(of_rows if call.return_along else (0,), dtype=torch.float32),
        q.new_empty(of_out if call.return_ungated else (0,)),
    )


def _backward_fake(given: BackwardCall) -> tuple[Tensor, ...]:
    return tuple(
        absent_gradient(given.call, bit)
        if leaf is None or not given.grad_mask >> bit & 1
        else leaf.new_empty(leaf.shape)
        for bit, leaf in enumerate(given.call.leaves)
    )


def absent_gradient(call: AttentionCall, bit: int) -> Tensor:
    """What stands for the gradient of a leaf that is absent or wants none."""
    leaf = call.leaves[bit]
    if leaf is not None:
        return leaf.new_empty((0,))
    return call.q.new_empty((0,), dtype=call.q.dtype if bit < len(_ROWS) else torch.float32)


FORWARD = Op(
    f"{FIXED}_forward",
    AttentionCall,
    "(Tensor out, Tensor lse, Tensor mixed, Tensor along, Tensor ungated)",
    function=FIXED,
    fake=_forward_fake,
    triton="resformer_kernels.attention.triton.forward:forward",
)
BACKWARD = Op(
    f"{FIXED}_backward",
    BackwardCall,
    f"({', '.join(f'Tensor d{name}' for name in LEAVES)})",
    function=FIXED,
    fake=_backward_fake,
    triton="resformer_kernels.attention.triton.backward:backward",
)


_PARTS = Parts(
    AttentionCall,
    (*_ROWS, *_COEFFICIENTS, *_OFFSETS, "sinks", "attn_bias", "exclusive", "out_gate"),
)


class ValueResidualAttention(torch.autograd.Function):
    """apply(namespace, *parts of a call) -> the forward op's results, empty if not asked for."""

    @staticmethod
    @signed
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        # One parameter: torch binds the signature at every call.
        namespace, rest, *tensors = arguments
        # Backward needs the LSE whether the caller does or not.
        call = _PARTS.join(rest, tensors)._replace(return_lse=True)
        result: tuple[Tensor, ...] = FORWARD(namespace, call)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.namespace, ctx.rest, *tensors = inputs
        out, lse, mixed, along, ungated = output
        call = _PARTS.join(ctx.rest, tensors)
        kept = ungated if call.return_ungated else out
        ctx.save_for_backward(*tensors, kept, lse, along if call.return_along else None)
        ctx.set_materialize_grads(False)
        unwanted = [along, ungated, *([] if call.return_lse else [lse])]
        ctx.mark_non_differentiable(*unwanted, *([] if call.return_mixed_value else [mixed]))

    @staticmethod
    def backward(
        ctx: Any,
        grad_out: Tensor | None,
        grad_lse: Tensor | None,
        grad_mixed: Tensor | None,
        *_: Any,
    ) -> tuple[Tensor | None, ...]:
        *tensors, out, lse, along = ctx.saved_tensors
        call = _PARTS.join(ctx.rest, tensors)
        needs = _PARTS.wanted(ctx, LEAVES)
        # torch.compile materialises the gradients of outputs that were marked not differentiable.
        given = BackwardCall(
            grad_out=torch.zeros_like(out) if grad_out is None else grad_out,
            grad_lse=grad_lse if call.return_lse else None,
            grad_mixed=grad_mixed if call.return_mixed_value else None,
            call=call,
            out=out,
            lse=lse,
            along=along,
            grad_mask=mask_of(needs),
        )
        gradients = run_backward(BACKWARD, ctx.namespace, given)
        return _PARTS.in_place(LEAVES, gradients, needs)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(FIXED))


def run(
    namespace: str,
    call: AttentionCall,
    keep: Callable[[AttentionCall], AttentionCall] = keeping,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse or None, mixed value or None) of `call`, by the ops of `namespace`. `keep` says
    what forward keeps for backward where something follows the softmax."""
    call = strides.with_unit_strides(call, (*_ROWS, *_OFFSETS))
    if torch.compiler.is_compiling():
        call = distinct(call)
    leaves = call.leaves
    if not torch.compiler.is_compiling():
        refuse_forward_mode(FIXED, leaves)
    if wants_gradient(leaves):
        call = call if call.plain else keep(call)
        out, lse, mixed, _, _ = ValueResidualAttention.apply(namespace, *_PARTS.split(call))
    else:
        out, lse, mixed, _, _ = FORWARD(namespace, call)
    return out, lse if call.return_lse else None, mixed if call.return_mixed_value else None


def copy_notes(call: AttentionCall) -> list[str]:
    """What `run` copies before the kernel, for `explain`."""
    return strides.copy_notes(call, _ROWS)

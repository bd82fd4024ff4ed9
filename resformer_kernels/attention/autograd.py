"""The gradient of value-residual attention, around the ops of `ops.py`.

Saved for backward: the inputs, out and lse. V' is never saved: backward mixes it again.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core.old import (
    copy_note,
    distinct,
    needs_copy,
    refuse_forward_mode,
    run_backward,
    unit_stride,
    wants_gradient,
)
from resformer_kernels.attention.op import VMAP_ERROR
from resformer_kernels.attention.record import AttentionCall


class Options(NamedTuple):
    """The arguments of the ops that are no tensors, in the schema's order, and whose ops."""

    lambda_v_value: float
    lambda_first_value: float
    max_seqlen_q: int
    max_seqlen_k: int
    window_left: int
    window_right: int
    scale: float
    softcap: float
    return_lse: bool
    return_mixed_value: bool
    namespace: str


def _shared_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    v_first: Tensor | None,
    lambda_v: Tensor | None,
    lambda_first: Tensor | None,
    sinks: Tensor | None,
    attn_bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    options: Options,
) -> tuple[Any, ...]:
    return (
        q,
        k,
        v,
        v_first,
        lambda_v,
        lambda_first,
        options.lambda_v_value,
        options.lambda_first_value,
        cu_seqlens_q,
        cu_seqlens_k,
        options.max_seqlen_q,
        options.max_seqlen_k,
        options.window_left,
        options.window_right,
        options.scale,
        options.softcap,
        sinks,
        attn_bias,
    )


def forward_op(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op, on the arguments that `ValueResidualAttention.apply` takes."""
    options: Options = arguments[-1]
    op = getattr(torch.ops, options.namespace).value_residual_attention_forward.default
    result: tuple[Tensor, Tensor, Tensor] = op(
        *_shared_arguments(*arguments), options.return_lse, options.return_mixed_value
    )
    return result


class ValueResidualAttention(torch.autograd.Function):
    """apply(q, k, v, v_first, lambda_v, lambda_first, sinks, attn_bias, cu_seqlens_q,
    cu_seqlens_k, options) -> (out, lse, mixed). The mixed value is empty where not asked for."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        # Backward needs the LSE whether the caller does or not.
        options: Options = arguments[-1]._replace(return_lse=True)
        return forward_op(*arguments[:-1], options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, options = inputs
        out, lse, mixed = output
        ctx.options = options
        ctx.save_for_backward(*tensors, out, lse)
        ctx.set_materialize_grads(False)
        unwanted = []
        if not options.return_lse:
            unwanted.append(lse)
        if not options.return_mixed_value:
            unwanted.append(mixed)
        ctx.mark_non_differentiable(*unwanted)

    @staticmethod
    def backward(
        ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, grad_mixed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:8]
        mask = sum(1 << bit for bit, needed in enumerate(wanted) if needed)
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        # torch.compile materialises the gradients of outputs that were marked not differentiable.
        if not ctx.options.return_lse:
            grad_lse = None
        if not ctx.options.return_mixed_value:
            grad_mixed = None
        arguments = (grad_out, grad_lse, grad_mixed, *tensors, ctx.options, out, lse, mask)
        gradients = run_backward("value_residual_attention", _backward_op, *arguments)
        found = [g if needed else None for g, needed in zip(gradients, wanted, strict=True)]
        return (*found, None, None, None)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(VMAP_ERROR)


def _backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    gradients, shared, kept = arguments[:3], arguments[3:-3], arguments[-3:]
    options: Options = shared[-1]
    op = getattr(torch.ops, options.namespace).value_residual_attention_backward.default
    result: tuple[Tensor, ...] = op(*gradients, *_shared_arguments(*shared), *kept)
    return result


def run_op(call: AttentionCall, namespace: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse or None, mixed value or None) of `call`, by the ops of `namespace`."""
    q, k, v, v_first = (
        x if x is None else unit_stride(x) for x in (call.q, call.k, call.v, call.v_first)
    )
    leaves = (q, k, v, v_first, call.lambda_v, call.lambda_first, call.sinks, call.attn_bias)
    options = Options(
        call.lambda_v_value,
        call.lambda_first_value,
        call.max_seqlen_q,
        call.max_seqlen_k,
        call.window_left,
        call.window_right,
        call.scale,
        call.softcap,
        call.return_lse,
        call.return_mixed_value,
        namespace,
    )
    offsets = [x if x is None else x.contiguous() for x in (call.cu_seqlens_q, call.cu_seqlens_k)]
    tensors = (*leaves, *offsets)
    if torch.compiler.is_compiling():
        tensors = distinct(tensors)
    else:
        refuse_forward_mode("value_residual_attention", leaves)
    apply = ValueResidualAttention.apply if wants_gradient(leaves) else forward_op
    out, lse, mixed = apply(*tensors, options)
    return out, lse if call.return_lse else None, mixed if call.return_mixed_value else None


def copy_notes(call: AttentionCall) -> list[str]:
    """What `run_op` does to the arguments before the kernel."""
    named = (("q", call.q), ("k", call.k), ("v", call.v), ("v_first", call.v_first))
    return [
        copy_note(name, tensor)
        for name, tensor in named
        if tensor is not None and needs_copy(tensor)
    ]

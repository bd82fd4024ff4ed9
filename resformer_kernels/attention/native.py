"""The compiled backend: C++ on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels import _extension
from resformer_kernels._launch import (
    copy_note,
    distinct,
    needs_copy,
    refuse_forward_mode,
    unit_stride,
    wants_gradient,
)
from resformer_kernels.attention.autograd import Options, ValueResidualAttention, forward_op
from resformer_kernels.attention.call import AttentionCall

NAME = "native"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(call: AttentionCall) -> str | None:
    """Why the native kernels cannot serve this call; None when they can."""
    if call.q.device.type != "cpu":
        return f"it runs on CPU tensors, these are on {call.q.device}"
    if call.q.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16, these are {call.q.dtype}"
    if call.cu_seqlens_q is not None and call.attn_bias is not None:
        return "it does not take attn_bias with packed sequences"
    return _extension.unavailable_reason()


def notes(call: AttentionCall) -> list[str]:
    """What this backend does to the arguments before the kernel."""
    named = (("q", call.q), ("k", call.k), ("v", call.v), ("v_first", call.v_first))
    return [
        copy_note(name, tensor)
        for name, tensor in named
        if tensor is not None and needs_copy(tensor)
    ]


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse or None, mixed value or None), as `AttentionCall` asks."""
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

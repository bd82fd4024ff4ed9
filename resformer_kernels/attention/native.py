"""The compiled backend: C++ on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from resformer_kernels import _extension
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
    return _extension.unavailable_reason()


def _copied(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] != 1


def notes(call: AttentionCall) -> list[str]:
    """What this backend does to the arguments before the kernel."""
    named = (("q", call.q), ("k", call.k), ("v", call.v), ("v_first", call.v_first))
    return [
        f"{name} is copied once: its last axis has stride {tensor.stride(-1)}, not 1"
        for name, tensor in named
        if tensor is not None and _copied(tensor)
    ]


def _unit_stride(tensor: Tensor | None) -> Tensor | None:
    return tensor.contiguous() if tensor is not None and _copied(tensor) else tensor


def _refuse_forward_mode(leaves: tuple[Tensor | None, ...]) -> None:
    # An op without a forward-mode rule drops tangents without a word.
    for leaf in leaves:
        if leaf is not None and forward_ad.unpack_dual(leaf).tangent is not None:
            raise RuntimeError(
                "value_residual_attention has no forward-mode derivative (jvp); "
                "backend='reference' has"
            )


def _distinct(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The same tensors, none of them twice: torch.compile takes none twice in a Function."""
    seen: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in seen)
        seen.append(tensor.view_as(tensor) if tensor is not None and repeated else tensor)
    return tuple(seen)


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse or None, mixed value or None), as `AttentionCall` asks."""
    q, k, v, v_first = (_unit_stride(x) for x in (call.q, call.k, call.v, call.v_first))
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
        tensors = _distinct(tensors)
    else:
        _refuse_forward_mode(leaves)
    differentiable = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in leaves
    )
    apply = ValueResidualAttention.apply if differentiable else forward_op
    out, lse, mixed = apply(*tensors, options)
    return out, lse if call.return_lse else None, mixed if call.return_mixed_value else None

"""The Triton backend: NVIDIA GPUs, and Triton's interpreter. Imports without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._triton import available as _triton
from resformer_kernels.kvcache.record import (
    KVCacheCall,
    copy_notes,
    op_arguments,
    strided_cache_reason,
)

NAME = "triton"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 256


def unsupported_reason(call: KVCacheCall) -> str | None:
    """Why the Triton kernels cannot serve this call; None when they can."""
    reason = _triton.unavailable_reason(call.q.device)
    if reason is not None:
        return reason
    if call.q.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16 queries, these are {call.q.dtype}"
    widest = max(call.q.shape[-1], call.v_cache.shape[-1])
    if widest > _WIDEST:
        return f"it serves head dimensions up to {_WIDEST}, these have {widest}"
    return strided_cache_reason(call)


def notes(call: KVCacheCall) -> list[str]:
    """What this backend does to the arguments before the kernel."""
    return copy_notes(call)


def run(call: KVCacheCall) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None); the caches have the new tokens in them."""
    out, lse = torch.ops.resformer_triton.attention_with_kvcache.default(*op_arguments(call))
    return out, lse if call.return_lse else None

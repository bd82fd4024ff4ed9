"""The compiled backend: C++ on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core import extension as _extension
from resformer_kernels.kvcache.record import (
    KVCacheCall,
    copy_notes,
    op_arguments,
    strided_cache_reason,
)

NAME = "native"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(call: KVCacheCall) -> str | None:
    """Why the native kernels cannot serve this call; None when they can."""
    foreign = _extension.foreign_device(call.q.device, cuda=False)
    if foreign is not None:
        return foreign
    if call.q.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16 queries, these are {call.q.dtype}"
    if call.k_cache.dtype not in (call.q.dtype, torch.int8):
        return f"it serves caches of q's dtype and of int8, these are {call.k_cache.dtype}"
    return strided_cache_reason(call) or _extension.unavailable_reason()


def notes(call: KVCacheCall) -> list[str]:
    """What this backend does to the arguments before the kernel."""
    return copy_notes(call)


def run(call: KVCacheCall) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None); the caches have the new tokens in them."""
    out, lse = torch.ops.resformer.attention_with_kvcache.default(*op_arguments(call))
    return out, lse if call.return_lse else None

"""The compiled backend: C++ on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels import _extension
from resformer_kernels._launch import copy_note, needs_copy
from resformer_kernels.kvcache.call import KVCacheCall, op_arguments

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
    for name, cache in (("k_cache", call.k_cache), ("v_cache", call.v_cache)):
        if needs_copy(cache):
            return (
                f"{name}'s last axis has stride {cache.stride(-1)}, not 1, and a cache is never "
                "copied"
            )
    return _extension.unavailable_reason()


def notes(call: KVCacheCall) -> list[str]:
    """What this backend does to the arguments before the kernel."""
    named = (("q", call.q), ("k", call.k), ("v", call.v))
    return [copy_note(name, x) for name, x in named if x is not None and needs_copy(x)]


def run(call: KVCacheCall) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None); the caches have the new tokens in them."""
    out, lse = torch.ops.resformer.attention_with_kvcache.default(*op_arguments(call))
    return out, lse if call.return_lse else None

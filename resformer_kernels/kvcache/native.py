"""The compiled backend: C++ on a CPU."""

from __future__ import annotations

from functools import partial

import torch

from resformer_kernels._core import extension
from resformer_kernels._core.hardware import Hardware
from resformer_kernels._core.op import NATIVE
from resformer_kernels.kvcache import op
from resformer_kernels.kvcache.record import KVCacheCall, copy_notes, kernel_reason

NAME = "native"


def unsupported_reason(call: KVCacheCall, hardware: Hardware) -> str | None:
    """Why the native kernels cannot serve this call; None when they can."""
    reason = extension.foreign_device(call.q.device, cuda=False) or kernel_reason(call)
    if reason is None and call.k_cache.dtype not in (call.q.dtype, torch.int8):
        return f"it serves caches of q's dtype and of int8, these are {call.k_cache.dtype}"
    return reason or hardware.cpu_library_reason()


notes = copy_notes
run = partial(op.run, NATIVE)

"""The compiled backend: C++ on a CPU."""

from __future__ import annotations

from functools import partial

import torch

from resformer_kernels._core import extension
from resformer_kernels._core.hardware import Hardware
from resformer_kernels._core.op import NATIVE
from resformer_kernels.attention import op
from resformer_kernels.attention.record import AttentionCall

NAME = "native"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(call: AttentionCall, hardware: Hardware) -> str | None:
    """Why the native kernels cannot serve this call; None when they can."""
    foreign = extension.foreign_device(call.q.device, cuda=False)
    if foreign is not None:
        return foreign
    if call.q.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16, these are {call.q.dtype}"
    if call.packed and call.attn_bias is not None:
        return "it does not take attn_bias with packed sequences"
    return hardware.cpu_library_reason()


notes = op.copy_notes
run = partial(op.run, NATIVE)

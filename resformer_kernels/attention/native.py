"""The compiled backend: C++ on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core import extension
from resformer_kernels._core.hardware import Hardware
from resformer_kernels.attention.autograd import copy_notes, run_op
from resformer_kernels.attention.op import NATIVE
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
    if call.cu_seqlens_q is not None and call.attn_bias is not None:
        return "it does not take attn_bias with packed sequences"
    return hardware.cpu_library_reason()


def notes(call: AttentionCall) -> list[str]:
    """What this backend does to the arguments before the kernel."""
    return copy_notes(call)


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse or None, mixed value or None), as `AttentionCall` asks."""
    return run_op(call, NATIVE)

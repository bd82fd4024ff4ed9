"""The Triton backend: NVIDIA GPUs, and Triton's interpreter. Imports without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core.hardware import Hardware
from resformer_kernels.attention.autograd import copy_notes, run_op
from resformer_kernels.attention.op import TRITON
from resformer_kernels.attention.record import AttentionCall

NAME = "triton"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WIDEST = 256


def unsupported_reason(call: AttentionCall, hardware: Hardware) -> str | None:
    """Why the Triton kernels cannot serve this call; None when they can."""
    reason = hardware.triton_reason(call.q.device)
    if reason is not None:
        return reason
    if call.q.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16, these are {call.q.dtype}"
    value = call.v if call.v is not None else call.v_first
    assert value is not None
    widest = max(call.q.shape[-1], value.shape[-1])
    if widest > _WIDEST:
        return f"it serves head dimensions up to {_WIDEST}, these have {widest}"
    return None


def notes(call: AttentionCall) -> list[str]:
    """What this backend does to the arguments before the kernel."""
    return copy_notes(call)


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse or None, mixed value or None), as `AttentionCall` asks."""
    return run_op(call, TRITON)

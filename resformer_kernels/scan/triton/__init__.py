"""The Triton backend: NVIDIA GPUs, and Triton's interpreter. Imports without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core.hardware import Hardware
from resformer_kernels.scan.autograd import copy_notes, run_op
from resformer_kernels.scan.op import TRITON
from resformer_kernels.scan.record import ScanCall

NAME = "triton"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)


def unsupported_reason(call: ScanCall, hardware: Hardware) -> str | None:
    """Why the Triton kernels cannot serve this call; None when they can."""
    reason = hardware.triton_reason(call.tokens.device)
    if reason is not None:
        return reason
    if call.tokens.dtype not in _DTYPES:
        return f"it serves float32, bfloat16, float16 and complex64, these are {call.tokens.dtype}"
    return None


def notes(call: ScanCall) -> list[str]:
    """What this backend does to the arguments before the kernel."""
    return copy_notes(call)


def run(call: ScanCall) -> tuple[Tensor, Tensor]:
    """(states, final state), contiguous."""
    return run_op(call, TRITON)

"""The Triton backend: NVIDIA GPUs, and Triton's interpreter. Imports without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core.hardware import Hardware
from resformer_kernels.mix.autograd import copy_notes, run_op
from resformer_kernels.mix.op import TRITON
from resformer_kernels.mix.record import EmbeddingCall, MixCall

NAME = "triton"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(call: MixCall | EmbeddingCall, hardware: Hardware) -> str | None:
    """Why the Triton kernels cannot serve this call; None when they can."""
    value = call.values[0] if isinstance(call, MixCall) else call.v
    reason = hardware.triton_reason(value.device)
    if reason is not None:
        return reason
    if value.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16, these are {value.dtype}"
    return None


def notes(call: MixCall | EmbeddingCall) -> list[str]:
    """What this backend does to the arguments before the kernel."""
    return copy_notes(call)


def run(call: MixCall | EmbeddingCall) -> Tensor:
    """The mixed value, contiguous, in the values' shape and dtype."""
    return run_op(call, TRITON)

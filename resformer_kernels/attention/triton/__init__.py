"""The Triton backend: NVIDIA GPUs, AMD's by name, its interpreter. Imports without Triton."""

from __future__ import annotations

from functools import partial

import torch

from resformer_kernels._core.hardware import MACHINE, Hardware
from resformer_kernels._core.op import TRITON
from resformer_kernels.attention import op
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
    widest = max(call.q.shape[-1], call.value.shape[-1])
    if widest > _WIDEST:
        return f"it serves head dimensions up to {_WIDEST}, these have {widest}"
    return None


def reason_against_auto(call: AttentionCall, hardware: Hardware) -> str | None:
    """Why only the backend's name takes these kernels; None where `auto` does."""
    return hardware.triton_reason_against_auto(call.q.device)


def notes(call: AttentionCall) -> list[str]:
    """What is copied, and whether a GPU like this one has run the kernels."""
    return [*op.copy_notes(call), *MACHINE.triton_notes(call.q.device)]


run = partial(op.run, TRITON)

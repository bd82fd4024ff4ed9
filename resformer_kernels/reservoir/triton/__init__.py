"""The Triton backend: NVIDIA GPUs, and Triton's interpreter. Imports without Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core.hardware import Hardware
from resformer_kernels.reservoir import autograd
from resformer_kernels.reservoir.op import TRITON
from resformer_kernels.reservoir.record import ReservoirCall, ReservoirInfo
from resformer_kernels.reservoir.reduction import Result

NAME = "triton"


def unsupported_reason(call: ReservoirCall, hardware: Hardware) -> str | None:
    """Why the Triton kernels cannot serve this call; None when they can."""
    reason = hardware.triton_reason(call.inputs.device)
    if reason is not None:
        return reason
    if call.inputs.dtype is not torch.float32:
        return f"its state is float32, inputs of {call.inputs.dtype} want another"
    return None


def notes(call: ReservoirCall) -> list[str]:
    """What this backend does to the arguments before the kernel, and keeps beside it."""
    return autograd.notes(call)


def run(call: ReservoirCall) -> tuple[Result, Tensor, ReservoirInfo]:
    """(states or their reduction, final state, info)."""
    return autograd.run_op(call, TRITON)

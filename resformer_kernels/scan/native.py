"""The compiled backend: C++ on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core import extension
from resformer_kernels._core.hardware import Hardware
from resformer_kernels.scan.autograd import copy_notes, run_op
from resformer_kernels.scan.op import NATIVE
from resformer_kernels.scan.record import ScanCall

NAME = "native"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)


def unsupported_reason(call: ScanCall, hardware: Hardware) -> str | None:
    """Why the native kernels cannot serve this call; None when they can."""
    foreign = extension.foreign_device(call.tokens.device, cuda=False)
    if foreign is not None:
        return foreign
    if call.tokens.dtype not in _DTYPES:
        return f"it serves float32, bfloat16, float16 and complex64, these are {call.tokens.dtype}"
    return hardware.cpu_library_reason()


def notes(call: ScanCall) -> list[str]:
    """What this backend does to the arguments before the kernel."""
    return copy_notes(call)


def run(call: ScanCall) -> tuple[Tensor, Tensor]:
    """(states, final state), contiguous."""
    return run_op(call, NATIVE)

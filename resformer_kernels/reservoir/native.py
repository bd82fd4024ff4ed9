"""The compiled backend: C++ on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels import _extension
from resformer_kernels.reservoir import autograd
from resformer_kernels.reservoir.call import ReservoirCall, ReservoirInfo
from resformer_kernels.reservoir.ops import NATIVE
from resformer_kernels.reservoir.reduction import Result

NAME = "native"


def unsupported_reason(call: ReservoirCall) -> str | None:
    """Why the native kernels cannot serve this call; None when they can."""
    foreign = _extension.foreign_device(call.inputs.device, cuda=False)
    if foreign is not None:
        return foreign
    if call.inputs.dtype is not torch.float32:
        return f"its state is float32, inputs of {call.inputs.dtype} want another"
    return _extension.unavailable_reason()


def notes(call: ReservoirCall) -> list[str]:
    """What this backend does to the arguments before the kernel, and keeps beside it."""
    return autograd.notes(call)


def run(call: ReservoirCall) -> tuple[Result, Tensor, ReservoirInfo]:
    """(states or their reduction, final state, info)."""
    return autograd.run_op(call, NATIVE)

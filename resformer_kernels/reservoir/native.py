"""The compiled backend: C++ on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels import _extension
from resformer_kernels._launch import copy_note, needs_copy
from resformer_kernels.reservoir.autograd import run_op, wants_states
from resformer_kernels.reservoir.call import ReservoirCall, ReservoirInfo
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
    found = [copy_note("inputs", call.inputs)] if needs_copy(call.inputs) else []
    if call.reduce != "none" and wants_states(call):
        found.append(f"every state is kept under reduce={call.reduce!r}: a gradient is wanted")
    return found


def run(call: ReservoirCall) -> tuple[Result, Tensor, ReservoirInfo]:
    """(states or their reduction, final state, info)."""
    return run_op(call)

"""The compiled backend: C++ on a CPU, and CUDA step after step where W fits on the chip."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core import extension
from resformer_kernels._core.hardware import Hardware
from resformer_kernels.reservoir import autograd
from resformer_kernels.reservoir.cuda_plan import fits
from resformer_kernels.reservoir.op import NATIVE
from resformer_kernels.reservoir.record import ReservoirCall, ReservoirInfo
from resformer_kernels.reservoir.reduction import Result

NAME = "native"


def unsupported_reason(call: ReservoirCall, hardware: Hardware) -> str | None:
    """Why the native kernels cannot serve this call; None when they can."""
    device = call.inputs.device
    foreign = extension.foreign_device(device, cuda=True)
    if foreign is not None:
        return foreign
    if call.inputs.dtype is not torch.float32:
        return f"its state is float32, inputs of {call.inputs.dtype} want another"
    if device.type == "cuda":
        return (
            _without_cuda_kernel(call)
            or hardware.cuda_library_reason(device)
            or _too_large(call, *hardware.cuda_memory(device))
        )
    return hardware.cpu_library_reason()


def _without_cuda_kernel(call: ReservoirCall) -> str | None:
    if call.weight.dim() == 1:
        return "its CUDA kernel takes dense and grouped weights, not CSR, rings and diagonals"
    if call.mode == "chunked":
        return "its CUDA kernel goes step after step, mode='chunked' cuts time"
    return None


def _too_large(call: ReservoirCall, multiprocessors: int, block_bytes: int) -> str | None:
    weight = call.weight
    size = weight.shape[-1]
    if fits(
        weight.shape[0] if weight.dim() == 3 else 1,
        size,
        0 if call.input_weight is None else call.inputs.shape[-1],
        call.sequences,
        weight.element_size(),
        multiprocessors=multiprocessors,
        block_bytes=block_bytes,
    ):
        return None
    return (
        f"its CUDA kernel keeps weights and states in shared memory: {call.units} units in groups "
        f"of {size} with {call.sequences} sequences do not fit into {multiprocessors} times "
        f"{block_bytes} bytes"
    )


def notes(call: ReservoirCall) -> list[str]:
    """What this backend does to the arguments before the kernel, and keeps beside it."""
    found = autograd.notes(call)
    if call.inputs.device.type == "cuda" and call.mode == "auto":
        found.append("mode='auto' is sequential: its CUDA kernel cuts no time")
    return found


def run(call: ReservoirCall) -> tuple[Result, Tensor, ReservoirInfo]:
    """(states or their reduction, final state, info)."""
    return autograd.run_op(call, NATIVE)

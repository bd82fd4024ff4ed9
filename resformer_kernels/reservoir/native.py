"""The compiled backend: C++ on a CPU, and CUDA step after step where W fits on the chip."""

from __future__ import annotations

from functools import partial

import torch

from resformer_kernels._core import extension
from resformer_kernels._core.hardware import Hardware
from resformer_kernels._core.op import NATIVE
from resformer_kernels.reservoir import op
from resformer_kernels.reservoir.cuda_plan import fits
from resformer_kernels.reservoir.record import (
    AUTO,
    CHUNKED,
    ReducedCall,
    ReservoirCall,
    couples_units,
)

NAME = "native"

run = partial(op.run, NATIVE)


def unsupported_reason(call: ReducedCall, hardware: Hardware) -> str | None:
    """Why the native kernels cannot serve this call; None when they can."""
    scan = call.scan
    device = scan.inputs.device
    foreign = extension.foreign_device(device, cuda=True)
    if foreign is not None:
        return foreign
    if scan.inputs.dtype is not torch.float32:
        return f"its state is float32, inputs of {scan.inputs.dtype} want another"
    coupled = couples_units(scan)
    if coupled is not None:
        return coupled
    if device.type == "cuda":
        return (
            _without_cuda_kernel(scan)
            or hardware.cuda_library_reason(device)
            or too_large(scan, *hardware.cuda_memory(device))
        )
    return hardware.cpu_library_reason()


def _without_cuda_kernel(scan: ReservoirCall) -> str | None:
    if scan.weight.dim() == 1:
        return "its CUDA kernel takes dense and grouped weights, not CSR, rings and diagonals"
    if scan.mode == CHUNKED:
        return "its CUDA kernel goes step after step, mode='chunked' splits time"
    return None


def too_large(scan: ReservoirCall, multiprocessors: int, block_bytes: int) -> str | None:
    """Why W and the states do not fit into the shared memory of a CUDA device."""
    weight = scan.weight
    size = weight.shape[-1]
    if fits(
        weight.shape[0] if weight.dim() == 3 else 1,
        size,
        0 if scan.input_weight is None else scan.inputs.shape[-1],
        scan.sequences,
        weight.element_size(),
        multiprocessors=multiprocessors,
        block_bytes=block_bytes,
    ):
        return None
    return (
        f"its CUDA kernel keeps weights and states in shared memory: {scan.units} units in groups "
        f"of {size} with {scan.sequences} sequences do not fit into {multiprocessors} times "
        f"{block_bytes} bytes"
    )


def notes(call: ReducedCall) -> list[str]:
    """Copies before the kernel, memory beside it, and the mode."""
    found = op.notes(call)
    if call.scan.inputs.device.type == "cuda" and call.scan.mode == AUTO:
        found.append("mode='auto' is sequential: its CUDA kernel does not split time")
    return found

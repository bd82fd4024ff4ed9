"""The compiled backend: C++ on a CPU, and on CUDA for `mix_values`."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core import extension
from resformer_kernels._core.hardware import Hardware
from resformer_kernels.mix.autograd import copy_notes, run_op
from resformer_kernels.mix.op import NATIVE
from resformer_kernels.mix.record import EmbeddingCall, MixCall

NAME = "native"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(call: MixCall | EmbeddingCall, hardware: Hardware) -> str | None:
    """Why the native kernels cannot serve this call; None when they can."""
    of_values = isinstance(call, MixCall)
    value = call.values[0] if isinstance(call, MixCall) else call.v
    foreign = extension.foreign_device(value.device, cuda=of_values)
    if foreign is not None:
        return foreign
    if value.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16, these are {value.dtype}"
    if value.device.type == "cuda":
        return hardware.cuda_library_reason(value.device)
    return hardware.cpu_library_reason()


def notes(call: MixCall | EmbeddingCall) -> list[str]:
    """What this backend does to the arguments before the kernel."""
    return copy_notes(call)


def run(call: MixCall | EmbeddingCall) -> Tensor:
    """The mixed value, contiguous, in the values' shape and dtype."""
    return run_op(call, NATIVE)

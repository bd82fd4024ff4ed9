"""The compiled backend: C++ on a CPU, and on CUDA for `mix_values`."""

from __future__ import annotations

from functools import partial

from resformer_kernels._core import extension
from resformer_kernels._core.hardware import Hardware
from resformer_kernels._core.op import NATIVE
from resformer_kernels.mix import op
from resformer_kernels.mix.record import EmbeddingCall, MixCall, copy_notes, dtype_reason

NAME = "native"


def unsupported_reason(call: MixCall | EmbeddingCall, hardware: Hardware) -> str | None:
    """Why the native kernels cannot serve this call; None when they can."""
    device = call.like.device
    reason = extension.foreign_device(device, cuda=isinstance(call, MixCall)) or dtype_reason(call)
    if reason is not None:
        return reason
    if device.type == "cuda":
        return hardware.cuda_library_reason(device)
    return hardware.cpu_library_reason()


notes = copy_notes
run = partial(op.run, NATIVE)

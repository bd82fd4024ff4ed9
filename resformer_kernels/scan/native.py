"""The compiled backend: C++ on a CPU."""

from __future__ import annotations

from functools import partial

from resformer_kernels._core import extension
from resformer_kernels._core.hardware import Hardware
from resformer_kernels._core.op import NATIVE
from resformer_kernels.scan import op
from resformer_kernels.scan.record import ScanCall, copy_notes, dtype_reason

NAME = "native"


def unsupported_reason(call: ScanCall, hardware: Hardware) -> str | None:
    """Why the native kernels cannot serve this call; None when they can."""
    foreign = extension.foreign_device(call.tokens.device, cuda=False)
    return foreign or dtype_reason(call) or hardware.cpu_library_reason()


notes = copy_notes
run = partial(op.run, NATIVE)

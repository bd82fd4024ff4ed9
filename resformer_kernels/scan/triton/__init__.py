"""The Triton backend: NVIDIA GPUs, and Triton's interpreter. Imports without Triton."""

from __future__ import annotations

from functools import partial

from resformer_kernels._core.hardware import Hardware
from resformer_kernels._core.op import TRITON
from resformer_kernels.scan import op
from resformer_kernels.scan.record import ScanCall, copy_notes, dtype_reason

NAME = "triton"


def unsupported_reason(call: ScanCall, hardware: Hardware) -> str | None:
    """Why the Triton kernels cannot serve this call; None when they can."""
    return hardware.triton_reason(call.tokens.device) or dtype_reason(call)


notes = copy_notes
run = partial(op.run, TRITON)

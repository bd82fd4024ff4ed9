"""The Triton backend: NVIDIA GPUs, AMD's by name, its interpreter. Imports without Triton."""

from __future__ import annotations

from functools import partial

from resformer_kernels._core.hardware import MACHINE, Hardware
from resformer_kernels._core.op import TRITON
from resformer_kernels.scan import op
from resformer_kernels.scan.record import ScanCall, copy_notes, dtype_reason

NAME = "triton"


def unsupported_reason(call: ScanCall, hardware: Hardware) -> str | None:
    """Why the Triton kernels cannot serve this call; None when they can."""
    return hardware.triton_reason(call.tokens.device) or dtype_reason(call)


def reason_against_auto(call: ScanCall, hardware: Hardware) -> str | None:
    """Why only the backend's name takes these kernels; None where `auto` does."""
    return hardware.triton_reason_against_auto(call.tokens.device)


def notes(call: ScanCall) -> list[str]:
    """What is copied, and whether a GPU like this one has run the kernels."""
    return [*copy_notes(call), *MACHINE.triton_notes(call.tokens.device)]


run = partial(op.run, TRITON)

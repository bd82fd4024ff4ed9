"""The Triton backend: NVIDIA GPUs, and Triton's interpreter. Imports without Triton."""

from __future__ import annotations

from functools import partial

import torch

from resformer_kernels._core.hardware import MACHINE, Hardware
from resformer_kernels._core.op import TRITON
from resformer_kernels.reservoir import op
from resformer_kernels.reservoir.record import ReducedCall, couples_units

NAME = "triton"


def unsupported_reason(call: ReducedCall, hardware: Hardware) -> str | None:
    """Why the Triton kernels cannot serve this call; None when they can."""
    inputs = call.scan.inputs
    reason = hardware.triton_reason(inputs.device)
    if reason is None and hardware.triton_reason_against_auto(inputs.device) is not None:
        return "Triton's compiler for AMD refuses its kernels, for a choice between two pointers"
    if reason is None and inputs.dtype is not torch.float32:
        return f"its state is float32, inputs of {inputs.dtype} want another"
    return reason or couples_units(call.scan)


def notes(call: ReducedCall) -> list[str]:
    """What is copied, and whether a GPU like this one has run the kernels."""
    return [*op.notes(call), *MACHINE.triton_notes(call.scan.inputs.device)]


run = partial(op.run, TRITON)

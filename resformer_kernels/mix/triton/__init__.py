"""The Triton backend: NVIDIA GPUs, AMD's by name, its interpreter. Imports without Triton."""

from __future__ import annotations

from functools import partial

from resformer_kernels._core.hardware import MACHINE, Hardware
from resformer_kernels._core.op import TRITON
from resformer_kernels.mix import op
from resformer_kernels.mix.record import EmbeddingCall, MixCall, copy_notes, dtype_reason

NAME = "triton"


def unsupported_reason(call: MixCall | EmbeddingCall, hardware: Hardware) -> str | None:
    """Why the Triton kernels cannot serve this call; None when they can."""
    return hardware.triton_reason(call.like.device) or dtype_reason(call)


def reason_against_auto(call: MixCall | EmbeddingCall, hardware: Hardware) -> str | None:
    """Why only the backend's name takes these kernels; None where `auto` does."""
    return hardware.triton_reason_against_auto(call.like.device)


def notes(call: MixCall | EmbeddingCall) -> list[str]:
    """What is copied, and whether a GPU like this one has run the kernels."""
    return [*copy_notes(call), *MACHINE.triton_notes(call.like.device)]


run = partial(op.run, TRITON)

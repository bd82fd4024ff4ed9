"""The Triton backend: NVIDIA GPUs, AMD's by name, its interpreter. Imports without Triton."""

from __future__ import annotations

from functools import partial

from resformer_kernels._core.hardware import MACHINE, Hardware
from resformer_kernels._core.op import TRITON
from resformer_kernels.kvcache import op
from resformer_kernels.kvcache.record import KVCacheCall, copy_notes, kernel_reason

NAME = "triton"

_WIDEST = 256


def unsupported_reason(call: KVCacheCall, hardware: Hardware) -> str | None:
    """Why the Triton kernels cannot serve this call; None when they can."""
    reason = hardware.triton_reason(call.q.device) or kernel_reason(call)
    widest = max(call.q.shape[-1], call.v_cache.shape[-1])
    if reason is None and widest > _WIDEST:
        return f"it serves head dimensions up to {_WIDEST}, these have {widest}"
    return reason


def reason_against_auto(call: KVCacheCall, hardware: Hardware) -> str | None:
    """Why only the backend's name takes these kernels; None where `auto` does."""
    return hardware.triton_reason_against_auto(call.q.device)


def notes(call: KVCacheCall) -> list[str]:
    """What is copied, and whether a GPU like this one has run the kernels."""
    return [*copy_notes(call), *MACHINE.triton_notes(call.q.device)]


run = partial(op.run, TRITON)

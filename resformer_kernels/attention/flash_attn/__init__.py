"""The backend of FlashAttention's own packages: `mix_values`, their kernel, then our epilogue.

In order of preference: FlashAttention 4 on compute capability 9 and 10, FlashAttention 3 on 9.0,
FlashAttention 2 from 8.0 on. What their kernels get wrong or cannot say is refused; what they leave
undone (rows after the packed sequences, the LSE of rows without keys) is done here. A package is
imported when a call asks for it that nothing else rules out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core.hardware import MACHINE, Hardware
from resformer_kernels._core.op import TRITON
from resformer_kernels.attention.flash_attn import figures
from resformer_kernels.attention.flash_attn.earlier import EARLIER, Earlier
from resformer_kernels.attention.flash_attn.four import FOUR, Four
from resformer_kernels.attention.flash_attn.rows import aligned
from resformer_kernels.attention.record import AttentionCall

NAME = "flash_attn"

_PACKAGES: tuple[Four | Earlier, ...] = (FOUR, *EARLIER)


def unsupported_reason(call: AttentionCall, hardware: Hardware) -> str | None:
    """Why no package of FlashAttention's can serve this call; None when one can."""
    reason = _device_reason(call.q.device, hardware) or _call_reason(call, hardware)
    if reason is not None:
        return reason
    reasons = []
    for package in _PACKAGES:
        reason = package.reason(call, hardware)
        if reason is None:
            return None
        reasons.append(f"{package.module}: {reason}")
    return "; ".join(reasons)


def preferred(call: AttentionCall, hardware: Hardware) -> bool:
    """Whether `auto` takes this backend before our own kernels, by published figures."""
    if _device_reason(call.q.device, hardware) is not None:
        return False
    least = figures.least_generation(call, hardware.capability(call.q.device)[0])
    if least is None or _call_reason(call, hardware) is not None:
        return False
    candidates = [package for package in _PACKAGES if package.generation >= least]
    return any(package.reason(call, hardware) is None for package in candidates)


def notes(call: AttentionCall) -> list[str]:
    """What runs, and what is copied before it."""
    found = [f"{_choose(call).module} serves it"]
    if not call.plain:
        found.append(
            "exclusive and out_gate are a pass over its output, by a Triton kernel of ours"
        )
    if call.mixes:
        found.append("V' is made by mix_values first, and read by the kernel")
    if call.packed:
        found.append("q, k and the values are copied once, with zeros after the last sequence")
        return found
    named = (("q", call.q), ("k", call.k), ("v", call.v), ("v_first", call.v_first))
    found += [
        f"{name} is copied once: its rows are not contiguous, or not aligned to 16 bytes"
        for name, tensor in named[: 2 if call.mixes else 4]
        if tensor is not None and not aligned(tensor)
    ]
    return found


def run(call: AttentionCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, lse or None, mixed value or None), as `AttentionCall` asks."""
    package = _choose(call)
    if call.plain:
        return package.run(call)
    bare = call._replace(
        exclusive=None,
        exclusive_value=0.0,
        out_gate=None,
        return_mixed_value=call.return_mixed_value or call.excludes,
    )
    y, lse, mixed = package.run(bare)
    # Its ops take a fifth of the package's import to register.
    from resformer_kernels.attention import epilogue_op

    out = epilogue_op.run(TRITON, epilogue_op.epilogue_of(call, y, mixed))
    return out, lse, mixed if call.return_mixed_value else None


def _choose(call: AttentionCall) -> Four | Earlier:
    return next(package for package in _PACKAGES if package.reason(call, MACHINE) is None)


def _device_reason(device: torch.device, hardware: Hardware) -> str | None:
    if device.type != "cuda":
        return f"it runs on CUDA tensors, these are on {device}"
    if torch.version.hip is not None:
        return "it was never run on ROCm, which these tensors are on"
    major, minor = hardware.capability(device)
    if major < 8:
        return f"it needs compute capability 8.0 or newer, {device} has {major}.{minor}"
    return None


def _call_reason(call: AttentionCall, hardware: Hardware) -> str | None:
    """What none of the packages serves."""
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"it serves bfloat16 and float16, these are {call.q.dtype}"
    if call.attn_bias is not None:
        return "it does not take attn_bias"
    if call.scale <= 0:
        return f"it takes the maximum before scaling, and so no scale of 0 or less ({call.scale})"
    # An empty grid is an error of the driver there.
    if 0 in (*call.q.shape, *call.k.shape, call.sequences, call.max_seqlen_q, call.max_seqlen_k):
        return "it does not take empty tensors"
    reason = None if call.plain else hardware.triton_reason(call.q.device)
    return None if reason is None else f"exclusive and out_gate need a Triton kernel here: {reason}"

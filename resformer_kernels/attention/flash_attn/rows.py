"""What every generation of FlashAttention is given and gives back."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.attention.record import AttentionCall

MULTIPLE = 8
"""Elements in 16 bytes: what their loads ask of strides and offsets."""

_BROKEN = (
    ImportError,
    OSError,
    RuntimeError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
)
"""What importing a package raises whose own parts are missing, or of versions that do not fit."""


def functions_of(
    name: str, needed: Mapping[str, Sequence[str]]
) -> tuple[Callable[..., Any], ...] | str:
    """Functions of module `name`, each with the parameters it needs, or why they cannot be used."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return "it is not installed"
        return f"it does not import: {error}"
    except _BROKEN as error:
        return f"it does not import: {error}"
    found = []
    for function, parameters in needed.items():
        # flash-attn-4 alone leaves a bare namespace `flash_attn`.
        if not hasattr(module, function):
            return f"it has no {function}: another version is needed"
        known = inspect.signature(getattr(module, function)).parameters
        absent = [parameter for parameter in parameters if parameter not in known]
        if absent:
            return f"its {function} takes no {', '.join(absent)}: another version is needed"
        found.append(getattr(module, function))
    return tuple(found)


def window(call: AttentionCall) -> tuple[int, int]:
    """The window, with -1 for a side that reaches every key."""
    left = -1 if call.window_left >= call.max_seqlen_k - 1 else call.window_left
    right = -1 if call.window_right >= call.max_seqlen_q - 1 else call.window_right
    return left, right


def after_last(cu_seqlens: Tensor | None, x: Tensor) -> Tensor | None:
    """(total,): whether a packed row lies after the last sequence; None where nothing is packed."""
    if cu_seqlens is None:
        return None
    return torch.arange(x.shape[0], device=x.device) >= cu_seqlens.select(0, -1)


def closed(x: Tensor, after: Tensor | None) -> Tensor:
    """x with zeros where `after`."""
    return x if after is None else x.masked_fill(after.view(-1, 1, 1), 0)


def aligned(x: Tensor) -> bool:
    """Whether each row is contiguous and starts at a multiple of 16 bytes."""
    strides = [
        stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1
    ]
    # torch.compile cannot trace the question; it copies misaligned inputs itself.
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
    rows_fit = x.stride(-1) == 1 and all(s > 0 and s % MULTIPLE == 0 for s in strides)
    return rows_fit and offset % MULTIPLE == 0


def ready(x: Tensor) -> Tensor:
    """x, copied where its rows are not `aligned`."""
    return x if aligned(x) else x.clone(memory_format=torch.contiguous_format)


def natural(lse: Tensor, out: Tensor) -> Tensor:
    """The LSE as the contract has it: theirs is infinite for rows without keys, and for NaN."""
    unknown = out.isnan().any(-1).transpose(-1, -2)
    instead = torch.where(unknown, torch.nan, -torch.inf)
    return torch.where(lse.isinf(), instead, lse)

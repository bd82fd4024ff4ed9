"""Arguments of the drop-ins beside tensors: what the originals take, and what is refused."""

from __future__ import annotations

from typing import Any

import torch

from resformer_kernels._core.checks import check_device, check_tensor, describe, integer, real
from resformer_kernels.attention.record import check_window


def number(name: str, value: Any) -> Any:
    """A number as the originals take it: True and False are 1 and 0."""
    return real(name, int(value) if isinstance(value, bool) else value)


def scale_of(name: str, value: Any) -> Any:
    """A softmax scale or None, finite."""
    if value is None:
        return None
    scale = number(name, value)
    if not abs(scale) < float("inf"):
        raise ValueError(f"{name} must be finite, got {scale}")
    return scale


def window_of(window_size: Any, causal: Any) -> tuple[int, int]:
    """(left, right) of any pair of integers, with `causal` folded in."""
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise TypeError(
            f"window_size must be a pair (left, right) of ints, got {describe(window_size)}"
        ) from None
    pair = integer("window_size", left), integer("window_size", right)
    return check_window(pair, causal, "window_size")


def check_ints(name: str, value: Any, batch: int, device: torch.device) -> None:
    """TypeError or ValueError unless `value` is (batch,), int32, on `device`."""
    # A number in this text would be a constant of a compiled graph.
    check_tensor(name, value, 1, "(batch,), int32")
    if value.shape[0] != batch:
        raise ValueError(f"{name} must be ({batch},), int32, got shape {tuple(value.shape)}")
    if value.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {value.dtype}")
    check_device(name, value, device)


def refuse(name: str, value: Any, why: str) -> None:
    """NotImplementedError, unless the value is None; `why` says what there is not."""
    if value is not None:
        raise NotImplementedError(f"{name} must be None: {why}")


def refuse_alibi(alibi_slopes: Any, instead: str) -> None:
    """NotImplementedError unless alibi_slopes is None; `instead` names the alternative."""
    refuse("alibi_slopes", alibi_slopes, f"the kernels have no ALiBi; {instead}")


def refuse_dropout(dropout_p: Any) -> None:
    """NotImplementedError unless dropout_p is 0, and ValueError outside [0, 1]."""
    share = number("dropout_p", dropout_p)
    if not 0 <= share <= 1:
        raise ValueError(f"dropout_p must be a probability, 0 to 1, got {share}")
    if share > 0:
        raise NotImplementedError(
            f"dropout_p must be 0, got {share}: the kernels drop no attention weights"
        )

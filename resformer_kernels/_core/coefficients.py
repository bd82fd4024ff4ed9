"""The mixing coefficients of every op: one rule for what fits, one form for the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import alone, check_dense, describe, real


def check_coefficient(
    name: str, value: Any, v: Tensor, *, takes: str = "a float or a tensor", **target: Any
) -> tuple[Tensor | None, float]:
    """(tensor, 1.0), the tensor with v's rank and axes of size 1 where it broadcasts; or
    (None, the number). Raises, naming the argument, where it does not fit: see `check_factor`.

    Under torch.compile a number becomes a tensor too.
    """
    if not isinstance(value, Tensor):
        if not alone(value):
            raise TypeError(f"{name} must be a number or a tensor, got {describe(value)}")
        number = real(name, value)
        if not torch.compiler.is_compiling():
            return None, float(number)
        # A float argument of an op is a constant of the compiled graph: one compile per value.
        dtype = torch.float64 if v.dtype is torch.float64 else torch.float32
        value = (v.new_ones((), dtype=dtype) * number).to(dtype)
    return check_factor(name, value, v, takes=takes, **target), 1.0


def check_factor(
    name: str,
    value: Tensor,
    v: Tensor,
    *,
    takes: str = "a tensor",
    of: str = "v",
    shape: tuple[int, ...] | None = None,
    onto: str | None = None,
    heads: str = "KV",
    other_heads: int | None = None,
) -> Tensor:
    """The tensor with v's rank, axes of size 1 where it broadcasts. Raises, naming the argument,
    where it does not fit.

    Args:
        name: the argument's, for errors; they say that it `takes` such.
        value: the tensor.
        v: the tensor whose dtype and device it may have; errors call that `of`.
        shape: what it broadcasts to, of v's rank; None: v's shape. Errors call that `onto`.
        heads: which heads the axis before the last counts, "KV" or "query"; `other_heads` is the
            number of the others, so that errors recognise a tensor that is sized to the wrong ones.
    """
    check_dense(name, value)
    if value.dtype != v.dtype and value.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32 or {of}'s dtype {v.dtype}, got {value.dtype}")
    if value.device != v.device:
        raise ValueError(f"{name} must be on {of}'s device {v.device}, got {value.device}")
    full = tuple(v.shape) if shape is None else shape
    missing = len(full) - value.dim()
    fits = missing >= 0
    if fits:
        for size, target in zip(value.shape, full[missing:], strict=True):
            fits = fits and (size == 1 or size == target)
    if not fits:
        hint = _hint(value, full[-2], heads, other_heads)
        whole = f"{of}'s shape" if onto is None else onto
        raise ValueError(
            f"{name} must be {takes} that broadcasts to {whole} {full} without enlarging it, "
            f"got shape {tuple(value.shape)}{hint}"
        )
    return value[(None,) * missing] if missing else value


def _hint(value: Tensor, count: int, heads: str, other: int | None) -> str:
    if value.dim() == 1 and value.shape[0] in (count, other):
        if value.shape[0] == count:
            return f"; one coefficient per {heads} head has shape ({count}, 1)"
        return f"; coefficients are per {heads} head, of which there are {count}: ({count}, 1)"
    if value.dim() >= 2 and value.shape[-2] == other != count:
        others = "query" if heads == "KV" else "KV"
        return (
            f"; it looks sized to the {other} {others} heads, but coefficients are per {heads} "
            f"head, of which there are {count}"
        )
    return ""

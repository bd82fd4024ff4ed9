"""The mixing coefficients of every op: one rule for what fits, one form for the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import alone, check_dense, describe, real


def check_coefficient(
    name: str, value: Any, v: Tensor, *, of: str = "v", query_heads: int | None = None
) -> tuple[Tensor | None, float]:
    """(tensor, 1.0), the tensor with v's rank and axes of size 1 where it broadcasts; or
    (None, the number). Raises, naming the argument, where it does not fit v; `of` is what errors
    call v, and query_heads lets them recognise a tensor that is sized to the wrong heads.

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
    check_dense(name, value)
    if value.dtype != v.dtype and value.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32 or {of}'s dtype {v.dtype}, got {value.dtype}")
    if value.device != v.device:
        raise ValueError(f"{name} must be on {of}'s device {v.device}, got {value.device}")
    missing = v.dim() - value.dim()
    fits = missing >= 0
    if fits:
        for size, target in zip(value.shape, v.shape[missing:], strict=True):
            fits = fits and (size == 1 or size == target)
    if not fits:
        raise ValueError(
            f"{name} must be a float or a tensor that broadcasts to {of}'s shape {tuple(v.shape)} "
            f"without enlarging it, got shape {tuple(value.shape)}{_hint(value, v, query_heads)}"
        )
    return value[(None,) * missing] if missing else value, 1.0


def _hint(value: Tensor, v: Tensor, query_heads: int | None) -> str:
    kv_heads = v.shape[-2]
    if value.dim() == 1 and value.shape[0] in (kv_heads, query_heads):
        if value.shape[0] == kv_heads:
            return f"; one coefficient per KV head has shape ({kv_heads}, 1)"
        return f"; coefficients are per KV head, of which there are {kv_heads}: ({kv_heads}, 1)"
    if value.dim() >= 2 and value.shape[-2] == query_heads != kv_heads:
        return (
            f"; it looks sized to the {query_heads} query heads, but coefficients are per KV head, "
            f"of which there are {kv_heads}"
        )
    return ""

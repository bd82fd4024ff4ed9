"""The records of the mixing calls, and the checks that lead to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core.checks import (
    DTYPES,
    alone,
    autocast,
    check_flag,
    check_tensor,
    describe,
    readable,
)
from resformer_kernels._core.coefficients import check_coefficient
from resformer_kernels._core.dtensors import is_dtensor
from resformer_kernels._core.op import refuse_vmap
from resformer_kernels._core.strides import copy_note, needs_copy

VALUES, EMBEDDING = "mix_values", "mix_value_embedding"

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPIED = ("v", "table")
"""Arguments of an embedding that are copied where their last axis is not contiguous."""

_AXES = "(batch, time, kv_heads, head_dim) or (total_tokens, kv_heads, head_dim)"


class MixCall(NamedTuple):
    """out = sum of coefficient i times values[i].

    The values share one shape of rank 4, or 3 if packed. Coefficient i is a tensor of that rank,
    with axes of size 1 where it broadcasts; where it is absent, of shape (0,), the number
    coefficient_values[i] serves.
    """

    values: tuple[Tensor, ...]
    coefficients: tuple[Tensor, ...]
    coefficient_values: tuple[float, ...]

    @property
    def like(self) -> Tensor:
        """A tensor of the result's shape and dtype."""
        return self.values[0]

    @property
    def terms(self) -> list[tuple[Tensor, Tensor | None, float]]:
        """(value, coefficient or None, number) of each source."""
        found = [present(c) for c in self.coefficients]
        return list(zip(self.values, found, self.coefficient_values, strict=True))


class EmbeddingCall(NamedTuple):
    """out = v + gate * table[token_ids]; the gate's forms are those of a coefficient."""

    v: Tensor
    table: Tensor
    token_ids: Tensor
    gate: Tensor | None
    gate_value: float
    sparse_grad: bool

    @property
    def like(self) -> Tensor:
        """A tensor of the result's shape and dtype."""
        return self.v


def absent_like(tensor: Tensor) -> Tensor:
    """Stands for an absent tensor in a list: nothing else has one axis."""
    return tensor.new_empty((0,))


def present(tensor: Tensor) -> Tensor | None:
    """None for an absent tensor."""
    return None if tensor.dim() == 1 else tensor


def dtype_reason(call: MixCall | EmbeddingCall) -> str | None:
    """Why kernels cannot serve the call's dtype; None when they can."""
    if call.like.dtype not in KERNEL_DTYPES:
        return f"it serves float32, bfloat16 and float16, these are {call.like.dtype}"
    return None


def copy_notes(call: MixCall | EmbeddingCall) -> list[str]:
    """The arguments that are copied before the kernel, for `explain`."""
    if isinstance(call, MixCall):
        named = [(f"values[{i}]", value) for i, value in enumerate(call.values)]
    else:
        named = [("v", call.v), ("table", call.table)]
    return [copy_note(name, tensor) for name, tensor in named if needs_copy(tensor)]


def _check_value(name: str, value: Any) -> None:
    check_tensor(name, value, (3, 4), _AXES)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")


def check_mix(values: Any, coefficients: Any) -> MixCall:
    """Check and normalise the arguments of `mix_values`."""
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"values must be a list or tuple of tensors, got {describe(values)}")
    if alone(coefficients):
        raise TypeError(
            f"coefficients must be a sequence of floats and tensors, got {describe(coefficients)}"
        )
    values, coefficients = tuple(values), tuple(coefficients)
    if not values:
        raise ValueError("values must hold at least one tensor, got none")
    if len(coefficients) != len(values):
        raise ValueError(
            f"coefficients must hold one entry for each of the {len(values)} values, "
            f"got {len(coefficients)}"
        )
    for i, value in enumerate(values):
        _check_value(f"values[{i}]", value)
    refuse_vmap(VALUES, (*values, *coefficients))
    values = tuple(autocast(x) for x in values)
    first = values[0]
    for i, value in enumerate(values):
        if value.shape != first.shape:
            raise ValueError(
                f"values[{i}] must have the shape of values[0], {tuple(first.shape)}, "
                f"got {tuple(value.shape)}"
            )
        if value.dtype != first.dtype:
            raise TypeError(
                f"values[{i}] must have the dtype of values[0], {first.dtype}, got {value.dtype}"
            )
        if value.device != first.device:
            raise ValueError(
                f"values[{i}] must be on the device of values[0], {first.device}, "
                f"got {value.device}"
            )
    checked = [
        check_coefficient(f"coefficients[{i}]", c, values[0], of="values[0]")
        for i, c in enumerate(coefficients)
    ]
    tensors = tuple(absent_like(values[0]) if c is None else c for c, _ in checked)
    return MixCall(values, tensors, tuple(x for _, x in checked))


def check_embedding(
    v: Any, table: Any, token_ids: Any, gate: Any, sparse_grad: Any
) -> EmbeddingCall:
    """Check and normalise the arguments of `mix_value_embedding`."""
    _check_value("v", v)
    check_tensor("table", table, 3, "(vocab, kv_heads, head_dim)")
    check_flag("sparse_grad", sparse_grad)
    refuse_vmap(EMBEDDING, (v, table, token_ids, gate))
    v = autocast(v)
    if table.shape[1:] != v.shape[-2:]:
        raise ValueError(
            f"table must be (vocab, kv_heads, head_dim) with v's last axes {tuple(v.shape[-2:])}, "
            f"got shape {tuple(table.shape)}"
        )
    if table.dtype != v.dtype and table.dtype is not torch.float32:
        raise TypeError(f"table must be float32 or have v's dtype {v.dtype}, got {table.dtype}")
    if table.device != v.device:
        raise ValueError(f"table must be on v's device {v.device}, got {table.device}")
    _check_token_ids(token_ids, v, table.shape[0])
    tensor, number = check_coefficient("gate", gate, v)
    if sparse_grad and torch.compiler.is_compiling():
        raise RuntimeError(
            "sparse_grad=True makes a sparse gradient, which torch.compile does not take: "
            "pass sparse_grad=False, or compile without this call"
        )
    if sparse_grad and is_dtensor(type(v)):
        raise RuntimeError(
            "sparse_grad=True makes a sparse gradient, which a DTensor cannot hold: pass "
            "sparse_grad=False"
        )
    return EmbeddingCall(v, table, token_ids, tensor, number, sparse_grad)


def _check_token_ids(token_ids: Any, v: Tensor, vocab: int) -> None:
    rows = tuple(v.shape[:-2])
    axes = f"{rows}, v's shape without its last two axes"
    if not isinstance(token_ids, Tensor):
        raise TypeError(f"token_ids must be an int64 or int32 tensor, got {describe(token_ids)}")
    check_tensor("token_ids", token_ids, len(rows), axes)
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"token_ids must be int64 or int32, got {token_ids.dtype}")
    if token_ids.shape != v.shape[:-2]:
        raise ValueError(f"token_ids must be {axes}, got shape {tuple(token_ids.shape)}")
    if token_ids.device != v.device:
        raise ValueError(f"token_ids must be on v's device {v.device}, got {token_ids.device}")
    if not readable(token_ids) or token_ids.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(token_ids))
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise ValueError(f"token_ids must lie in [0, {vocab}), the rows of table, got {wrong}")

"""Schemas and fakes of the mixing ops. C++ supplies the implementations; torch alone is needed.

A coefficient that is no tensor travels as a number, with a tensor of shape (0,) in its place where
the schema has a list; so does a gradient that is not wanted.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from resformer_kernels._launch import vmap_error

VALUES = "mix_values"
EMBEDDING = "mix_value_embedding"

_EMBEDDED = "Tensor table, Tensor token_ids, Tensor? gate, float gate_value"

_lib = torch.library.Library("resformer", "FRAGMENT")
_lib.define(
    f"{VALUES}_forward(Tensor[] values, Tensor[] coefficients, float[] coefficient_values) "
    "-> Tensor"
)
_lib.define(
    f"{VALUES}_backward(Tensor grad, Tensor[] values, Tensor[] coefficients, "
    "float[] coefficient_values, int[] grad_mask) -> Tensor[]"
)
_lib.define(f"{EMBEDDING}_forward(Tensor v, {_EMBEDDED}) -> Tensor")
_lib.define(
    f"{EMBEDDING}_backward(Tensor grad, {_EMBEDDED}, int grad_mask) "
    "-> (Tensor dtable, Tensor dgate)"
)
_lib.define(f"{EMBEDDING}_backward_sparse(Tensor grad, {_EMBEDDED}) -> (Tensor ids, Tensor rows)")


@torch.library.register_fake(f"resformer::{VALUES}_forward", lib=_lib)
def _values_forward_fake(values: list[Tensor], *_coefficients: Any) -> Tensor:
    return values[0].new_empty(values[0].shape)


@torch.library.register_fake(f"resformer::{VALUES}_backward", lib=_lib)
def _values_backward_fake(
    grad: Tensor,
    _values: list[Tensor],
    coefficients: list[Tensor],
    _numbers: list[float],
    grad_mask: list[int],
) -> list[Tensor]:
    leaves = [*[grad] * len(coefficients), *coefficients]
    return [
        leaf.new_empty(leaf.shape if wanted else (0,))
        for leaf, wanted in zip(leaves, grad_mask, strict=True)
    ]


@torch.library.register_fake(f"resformer::{EMBEDDING}_forward", lib=_lib)
def _embedding_forward_fake(v: Tensor, *_embedded: Any) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.register_fake(f"resformer::{EMBEDDING}_backward", lib=_lib)
def _embedding_backward_fake(
    grad: Tensor,
    table: Tensor,
    _token_ids: Tensor,
    gate: Tensor | None,
    _gate_value: float,
    grad_mask: int,
) -> tuple[Tensor, Tensor]:
    leaf = grad if gate is None else gate
    return (
        table.new_empty(table.shape if grad_mask & 1 else (0,)),
        leaf.new_empty(leaf.shape if grad_mask & 2 else (0,)),
    )


@torch.library.register_fake(f"resformer::{EMBEDDING}_backward_sparse", lib=_lib)
def _embedding_backward_sparse_fake(
    _grad: Tensor, table: Tensor, token_ids: Tensor, *_gate: Any
) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    ids = token_ids.new_empty((count,), dtype=torch.int64)
    return ids, table.new_empty((count, *table.shape[1:]))


def _refuse_vmap(op: str, names: tuple[str, ...]) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise RuntimeError(vmap_error(op))

    for name in names:
        _lib.impl(f"{op}_{name}", refuse, "FuncTorchBatched")


_refuse_vmap(VALUES, ("forward", "backward"))
_refuse_vmap(EMBEDDING, ("forward", "backward", "backward_sparse"))

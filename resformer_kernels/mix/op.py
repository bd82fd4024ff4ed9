"""Schemas and fakes of the mixing ops; torch alone is needed.

One schema, two namespaces: `resformer`, whose implementations C++ supplies, and `resformer_triton`,
whose launcher is imported, and Triton with it, when an op is first called.

A coefficient that is no tensor travels as a number, with a tensor of shape (0,) in its place where
the schema has a list; so does a gradient that is not wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core.old import vmap_error

VALUES = "mix_values"
EMBEDDING = "mix_value_embedding"

NATIVE, TRITON = "resformer", "resformer_triton"

_EMBEDDED = "Tensor table, Tensor token_ids, Tensor? gate, float gate_value"


def _values_forward_fake(values: list[Tensor], *_coefficients: Any) -> Tensor:
    return values[0].new_empty(values[0].shape)


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


def _embedding_forward_fake(v: Tensor, *_embedded: Any) -> Tensor:
    return v.new_empty(v.shape)


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


def _embedding_backward_sparse_fake(
    _grad: Tensor, table: Tensor, token_ids: Tensor, *_gate: Any
) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    ids = token_ids.new_empty((count,), dtype=torch.int64)
    return ids, table.new_empty((count, *table.shape[1:]))


_OPS: tuple[tuple[str, str, str, Callable[..., Any]], ...] = (
    (
        VALUES,
        "forward",
        "(Tensor[] values, Tensor[] coefficients, float[] coefficient_values) -> Tensor",
        _values_forward_fake,
    ),
    (
        VALUES,
        "backward",
        "(Tensor grad, Tensor[] values, Tensor[] coefficients, float[] coefficient_values, "
        "int[] grad_mask) -> Tensor[]",
        _values_backward_fake,
    ),
    (EMBEDDING, "forward", f"(Tensor v, {_EMBEDDED}) -> Tensor", _embedding_forward_fake),
    (
        EMBEDDING,
        "backward",
        f"(Tensor grad, {_EMBEDDED}, int grad_mask) -> (Tensor dtable, Tensor dgate)",
        _embedding_backward_fake,
    ),
    (
        EMBEDDING,
        "backward_sparse",
        f"(Tensor grad, {_EMBEDDED}) -> (Tensor ids, Tensor rows)",
        _embedding_backward_sparse_fake,
    ),
)


def define(namespace: str) -> torch.library.Library:
    """The mixing ops in a namespace: schemas, fakes and what they say under vmap. They go when the
    library does."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for op, part, signature, fake in _OPS:
        name = f"{op}_{part}"
        library.define(name + signature)
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
        library.impl(name, _no_vmap(op), "FuncTorchBatched")
    return library


def _no_vmap(op: str) -> Callable[..., NoReturn]:
    def refuse(*_args: Any, **_kwargs: Any) -> NoReturn:
        raise RuntimeError(vmap_error(op))

    return refuse


def _by_triton(name: str) -> Callable[..., Any]:
    def launch(*arguments: Any) -> Any:
        import resformer_kernels.mix.triton.launch as launchers

        return getattr(launchers, name)(*arguments)

    return launch


_libraries = {namespace: define(namespace) for namespace in (NATIVE, TRITON)}
for _op, _part, *_ in _OPS:
    # CPU tensors are for Triton's interpreter.
    for _key in ("CUDA", "CPU"):
        _libraries[TRITON].impl(f"{_op}_{_part}", _by_triton(f"{_op}_{_part}"), _key)

"""The cases of `mix_values` and `mix_value_embedding` in the table of `verification.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from resformer_kernels.testing.problems import Arguments, Problem

Shape: TypeAlias = tuple[int, int, int, int]
"""Batch, time, heads, head_dim."""


def mix_problem(
    sources: int, dtype: torch.dtype, device: str, shape: Shape = (2, 33, 3, 24)
) -> Problem:
    """`sources` values with coefficients of every form."""
    batch, time, heads, dim = shape
    forms: tuple[tuple[int, ...], ...] = (
        *((), (heads, 1), (batch, time, 1, 1), (heads, dim), (batch, time, heads, 1)),
    )
    generator = torch.Generator().manual_seed(sources)
    values = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(sources)]
    coefficients = [torch.randn(f, generator=generator).to(device) for f in forms[:sources]]
    grad = torch.randn(shape, generator=generator).to(device, dtype)
    return Problem(
        [*values, *coefficients],
        lambda leaves: ((leaves[:sources], leaves[sources:]), {}),
        [grad],
        ["out", *(f"d{name}[{i}]" for name in ("v", "coefficient") for i in range(sources))],
        lambda leaves, grads: ([x.expand(shape) for x in leaves], grads),
    )


def embedding_problem(
    dtype: torch.dtype, device: str, shape: Shape = (2, 65, 3, 24), rows: int = 11
) -> Problem:
    """A gate a token and head; `rows` of the table, that many tokens share."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(shape, generator=generator).to(device, dtype)
    table = torch.randn((rows, *shape[2:]), generator=generator).to(device)
    token_ids = torch.randint(rows, shape[:2], generator=generator).to(device)
    gate = torch.rand((*shape[:3], 1), generator=generator).to(device)
    grad = torch.randn(shape, generator=generator).to(device, dtype)
    # A table with one row a token has, as its gradient, the terms that the table's sums up.
    every_row = torch.arange(token_ids.numel(), device=device).view(token_ids.shape)

    def arguments(leaves: Sequence[Tensor]) -> Arguments:
        ids = token_ids if leaves[1].shape == table.shape else every_row
        return (leaves[0], leaves[1], ids, leaves[2]), {}

    return Problem(
        [v, table, gate],
        arguments,
        [grad],
        ["out", "dv", "dtable", "dgate"],
        lambda leaves, grads: (
            [leaves[0], leaves[1][token_ids].flatten(0, 1), leaves[2].expand(shape)],
            grads,
        ),
    )

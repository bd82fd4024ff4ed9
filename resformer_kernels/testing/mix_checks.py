"""The cases of `mix_values` and `mix_value_embedding` in the table of `verification.py`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resformer_kernels.testing.problems import Arguments, Problem

_SHAPE = (2, 33, 3, 24)
_FORMS: tuple[tuple[int, ...], ...] = ((), (3, 1), (2, 33, 1, 1), (3, 24), (2, 33, 3, 1))
"""Shapes of the coefficients."""


def mix_problem(sources: int, dtype: torch.dtype, device: str) -> Problem:
    """`sources` values with coefficients of every form."""
    generator = torch.Generator().manual_seed(sources)
    values = [torch.randn(_SHAPE, generator=generator).to(device, dtype) for _ in range(sources)]
    coefficients = [torch.randn(f, generator=generator).to(device) for f in _FORMS[:sources]]
    grad = torch.randn(_SHAPE, generator=generator).to(device, dtype)
    return Problem(
        [*values, *coefficients],
        lambda leaves: ((leaves[:sources], leaves[sources:]), {}),
        [grad],
        ["out", *(f"d{name}[{i}]" for name in ("v", "coefficient") for i in range(sources))],
        lambda leaves, grads: ([x.expand(_SHAPE) for x in leaves], grads),
    )


def embedding_problem(dtype: torch.dtype, device: str) -> Problem:
    """A gate a token and head; rows of the table that many tokens share."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 65, 3, 24)
    v = torch.randn(shape, generator=generator).to(device, dtype)
    table = torch.randn((11, 3, 24), generator=generator).to(device)
    token_ids = torch.randint(11, shape[:2], generator=generator).to(device)
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

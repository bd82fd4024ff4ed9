"""A weight as the Triton kernel reads it, and its transpose; the host reads nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from resformer_kernels.reservoir.triton.steps import CSR, DEPTH, ENTRIES, GROUPS

PAYING = 1024
"""Entries of W: with fewer, a step is too short for many at once to help."""


class Weight(NamedTuple):
    """W: dense groups (G, n, n), one entry per row, or CSR. Indices are int32 and within bounds."""

    kind: int
    values: Tensor
    rows: Tensor | None
    columns: Tensor | None
    groups: int
    size: int
    """Units of a group."""
    independent: bool
    """A diagonal: no unit reads another."""

    @property
    def work(self) -> int:
        """Multiply-adds of a step."""
        return self.values.numel() * (self.size if self.kind == ENTRIES.value else 1)

    @property
    def pays(self) -> bool:
        """Whether parallel chunks are faster than step after step."""
        return self.kind != ENTRIES.value and self.values.numel() >= PAYING


def read_weight(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Weight:
    """The weight of an op's arguments."""
    if weight.dim() > 1:
        groups = weight.shape[0] if weight.dim() == 3 else 1
        return Weight(GROUPS.value, weight, None, None, groups, weight.shape[-1], False)
    if rows is not None:
        assert columns is not None
        units = rows.shape[0] - 1
        bounded = rows.clamp(0, weight.shape[0]).int(), columns.clamp(0, units - 1).int()
        return Weight(CSR.value, weight, *bounded, 1, units, False)
    units = weight.shape[0]
    if columns is None:
        columns, independent = torch.arange(units, device=weight.device), True
    else:
        columns, independent = columns.clamp(0, units - 1), False
    return Weight(ENTRIES.value, weight, None, columns.int(), 1, units, independent)


def transposed(w: Weight) -> Weight:
    """Wᵀ. The columns of one-entry rows must be a permutation."""
    if w.kind == GROUPS.value:
        return w._replace(values=w.values.mT)
    assert w.columns is not None
    if w.kind == ENTRIES.value:
        # Unit j receives from the unit that read it.
        readers = torch.argsort(w.columns)
        return w._replace(values=w.values[readers], columns=readers.int())
    assert w.rows is not None
    order = torch.argsort(w.columns, stable=True)
    entries = torch.arange(w.columns.shape[0], device=order.device, dtype=torch.int32)
    row_of = torch.searchsorted(w.rows[1:].contiguous(), entries, right=True)
    ends = torch.searchsorted(
        w.columns[order], torch.arange(w.size + 1, device=order.device, dtype=torch.int32)
    )
    return w._replace(values=w.values[order], columns=row_of[order].int(), rows=ends.int())


def packed_weight(weight: Weight, padded: int, depth: int) -> Tensor:
    """Groups as (G, depth, padded): k by units, padded with zeros. Entries as they are."""
    if weight.kind != GROUPS.value:
        return weight.values.float().contiguous()
    values = weight.values if weight.values.dim() == 3 else weight.values[None]
    size = values.shape[-1]
    return pad(values.mT, (0, padded - size, 0, depth - size)).contiguous()


def packed_projection(projection: Tensor, groups: int, padded: int) -> Tensor:
    """W_in as (inputs, groups * padded), both padded with zeros."""
    size, inputs = projection.shape[0] // groups, projection.shape[1]
    depth = -inputs % DEPTH.value
    packed = pad(projection.float().view(groups, size, inputs), (0, depth, 0, padded - size))
    return packed.view(groups * padded, inputs + depth).T.contiguous()

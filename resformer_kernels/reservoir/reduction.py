"""Reductions of states in memory, in differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels._core import dtensors

Result = Tensor | tuple[Tensor, Tensor]

_PIECE = 64
"""Steps summed one after another."""


def reduce_states(
    states: Tensor,
    final_state: Tensor,
    cu_seqlens: Tensor | None,
    targets: Tensor | None,
    reduce: str,
) -> Result:
    """`states` (B, T, N), or packed (total, N), reduced as `reservoir_scan` says."""
    if reduce == "none":
        return states
    if reduce == "last":
        return final_state.clone()
    distributed = dtensors.is_dtensor(type(states))
    if distributed and cu_seqlens is not None:
        raise RuntimeError(
            f"reservoir_scan: reduce={reduce!r} of packed sequences has no gradient where tensors "
            "are DTensors: reduce the states, or call it under torch.no_grad()"
        )
    if reduce == "mean":
        sums = sums_over_time(states, cu_seqlens, states.dtype)
        if cu_seqlens is None:
            return sums / max(states.shape[1], 1)
        return sums / cu_seqlens.diff().clamp(min=1).to(sums.dtype)[:, None]
    if distributed:
        return _gram_by_sequence(states.double(), targets)
    steps = states.double().flatten(0, -2)
    if targets is None:
        return steps.T @ steps, steps.new_zeros((steps.shape[-1], 0))
    wanted = targets.double()
    if cu_seqlens is not None:
        wanted = wanted.where((_positions(wanted) < cu_seqlens[-1])[:, None], 0)
    return steps.T @ steps, steps.T @ wanted.flatten(0, -2)


def _gram_by_sequence(states: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
    """The pair of "gram" where ranks have sequences of their own: DTensors do not flatten a batch
    that is split unevenly."""
    gram = (states.mT @ states).sum(0)
    if targets is None:
        return gram, gram.new_zeros((gram.shape[0], 0))
    return gram, (states.mT @ targets.double()).sum(0)


def sums_over_time(states: Tensor, cu_seqlens: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Each sequence's states summed, (B, N) or (sequences, N)."""
    if cu_seqlens is None:
        return states.sum(1, dtype=dtype)
    if states.device.type != "cpu":
        return sums_in_pieces(states.to(dtype), cu_seqlens)
    # The last segment holds the steps of no sequence.
    segment = torch.searchsorted(cu_seqlens[1:].contiguous(), _positions(states), right=True)
    sums = states.new_zeros((cu_seqlens.shape[0], states.shape[-1]), dtype=dtype)
    return sums.index_add(0, segment, states.to(dtype))[:-1]


def sums_in_pieces(states: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each sequence's states (total, N) summed, in an order that is fixed on every device.

    `index_add` adds in any order on a GPU. Here the pieces of all sequences are summed in parallel,
    each in order, then the pieces of each sequence.
    """
    places = torch.arange(0, states.shape[0] + 1, _PIECE, device=states.device, dtype=torch.int32)
    bounds = torch.cat((cu_seqlens, places.clamp(max=cu_seqlens[-1]))).sort().values.long()
    pieces = segment_sums(states, bounds)
    return segment_sums(pieces, torch.searchsorted(bounds, cu_seqlens.long()))


def segment_sums(rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows (total, N) from offsets[i] to offsets[i + 1] summed in order, each i on its own."""
    # `unsafe`: the host would read the offsets to check them, and wait for a GPU.
    return torch.segment_reduce(rows, "sum", offsets=offsets, initial=0, unsafe=True)


def _positions(states: Tensor) -> Tensor:
    return torch.arange(states.shape[0], device=states.device, dtype=torch.int32)

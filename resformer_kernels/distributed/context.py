"""The context under which the package's ops see one sequence that is split across ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core import across
from resformer_kernels._core.checks import describe, integer
from resformer_kernels.distributed import attention, reservoir, scan
from resformer_kernels.distributed.sequence import Deal
from resformer_kernels.distributed.split import Split
from resformer_kernels.distributed.transport import ranks_of

_SERVED: dict[str, Callable[..., Any]] = {
    "value_residual_attention": attention.serve,
    "linear_scan": scan.serve,
    "reservoir_scan": reservoir.serve,
}
"""What serves the ops that look along the sequence: serve(split, backend, backends, call)."""
_LOCAL = ("mix_values", "mix_value_embedding")
"""Ops that look at one position at a time."""


class ShardedSequence(Split):
    """A sequence of which every rank holds a part: what `context_parallel` yields.

    Attributes:
        positions: this rank's positions, (tokens of this rank,), int64, on the CPU.
    """

    @property
    def positions(self) -> Tensor:
        """This rank's positions in the whole sequence, in the order in which it holds them."""
        return torch.cat([torch.arange(piece.start, piece.stop) for piece in self.mine])

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of x, whose axis `dim` is the whole sequence; a copy.

        Raises ValueError where that axis has another length.
        """
        dim = self._axis(x, dim, self.deal.length, "the whole sequence")
        return torch.cat([x.narrow(dim, piece.start, piece.length) for piece in self.mine], dim)

    @torch.no_grad()
    def gather(self, x: Tensor, dim: int) -> Tensor:
        """The whole of x, of whose axis `dim` every rank holds its part; without a gradient.

        Every rank calls it. Raises ValueError where this rank's part has another length.
        """
        dim = self._axis(x, dim, self.deal.held(self.ranks.rank), "this rank's part")
        return self.whole(x.movedim(dim, 1), "gathered").movedim(1, dim)

    def _axis(self, x: Tensor, dim: int, length: int, of: str) -> int:
        dim = integer("dim", dim)
        if not -x.dim() <= dim < x.dim():
            raise ValueError(f"dim must be an axis of x, got {dim} and {describe(x)}")
        if x.shape[dim] != length:
            raise ValueError(
                f"x must hold {length} positions, {of}, on axis {dim}, got {describe(x)}"
            )
        return dim % x.dim()

    def serve(self, op: str, backend: str, backends: Sequence[Any], call: Any) -> Any:
        """What the op gives on this rank's part of the sequence."""
        if op in _SERVED:
            return _SERVED[op](self, backend, backends, call)
        if op in _LOCAL:
            return self.local(op, backend, backends, call)
        served = ", ".join((*_SERVED, *_LOCAL))
        raise RuntimeError(f"{op} cannot run under context_parallel, which serves {served}")


@contextmanager
def context_parallel(
    mesh: Any,
    *,
    buffers: Sequence[Tensor] | None = None,
    buffer_seq_dims: Sequence[int] | None = None,
    no_restore_buffers: set[Tensor] | None = None,
    length: int | None = None,
    balanced: bool = True,
) -> Iterator[ShardedSequence]:
    """Split sequences across ranks: inside, every op acts on this rank's part as on the whole.

    `value_residual_attention` is ring attention (Liu et al., arXiv 2310.01889), `linear_scan` and
    `reservoir_scan` carry their state from rank to rank, and `nn.RotaryEmbedding` gives this rank's
    positions, so a model needs no change. What a model adds of its own per position (tables of
    positions, targets) is sharded: list it in `buffers`, or use `shard`. Both the forward and the
    backward pass belong inside, and every rank runs them through the same calls: one whose loss
    leaves a result out keeps the others waiting. Packed sequences, `attn_bias` and caches raise.

    Results equal those of one process to rounding. The gradients of what every rank holds
    (parameters, coefficients, sinks, initial states) are this rank's part: summed over the ranks
    they are the whole.

    Args:
        mesh: a DeviceMesh of one axis, or a ProcessGroup: the ranks that share sequences.
        buffers: tensors that hold whole sequences, the same on every rank. Inside they hold this
            rank's part; afterwards what they held before. They must not require gradients.
        buffer_seq_dims: the axis of each buffer that is the sequence.
        no_restore_buffers: those of them that need not be put back.
        length: of the sequences, in tokens; None: that of the first buffer.
        balanced: give every rank one range from the front and one from the back, which shares a
            causal mask's work evenly; else one range, in order.

    Yields:
        A `ShardedSequence`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or size. Inside, ops raise ValueError
        where their sequences are not this rank's part, and RuntimeError where they cannot run so.
    """
    ranks = ranks_of(mesh)
    buffers, dims = list(buffers or ()), list(buffer_seq_dims or ())
    _check_buffers(buffers, dims)
    if length is None:
        if not buffers:
            raise ValueError("length must be given where there are no buffers")
        length = buffers[0].shape[dims[0]]
    sequence = ShardedSequence(ranks, Deal(length, ranks.count, balanced))
    kept = [x for x in buffers if not any(x is y for y in no_restore_buffers or ())]
    before = [x.clone() for x in kept]
    parts = [sequence.shard(x, dim) for x, dim in zip(buffers, dims, strict=True)]
    try:
        for buffer, part in zip(buffers, parts, strict=True):
            _replace(buffer, part)
        with across.entered(sequence):
            yield sequence
    finally:
        sequence.memo.clear()
        for buffer, whole in zip(kept, before, strict=True):
            _replace(buffer, whole)


def _check_buffers(buffers: Sequence[Any], dims: Sequence[Any]) -> None:
    if len(buffers) != len(dims):
        raise ValueError(f"buffer_seq_dims must have {len(buffers)} entries, got {len(dims)}")
    for i, (buffer, dim) in enumerate(zip(buffers, dims, strict=True)):
        if not isinstance(buffer, Tensor):
            raise TypeError(f"buffers[{i}] must be a tensor, got {describe(buffer)}")
        if buffer.requires_grad:
            raise ValueError(f"buffers[{i}] must not require a gradient: use shard for it")
        name = f"buffer_seq_dims[{i}]"
        if not -buffer.dim() <= integer(name, dim) < buffer.dim():
            raise ValueError(f"{name} must be an axis of buffers[{i}], got {dim}")


@torch.no_grad()
def _replace(buffer: Tensor, value: Tensor) -> None:
    buffer.resize_(value.shape)
    buffer.copy_(value)

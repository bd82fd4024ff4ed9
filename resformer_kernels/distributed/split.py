"""What the ops under `context_parallel` share: the ranks, and who holds which positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.select import select
from resformer_kernels.distributed.sequence import Deal, Piece
from resformer_kernels.distributed.transport import Ranks

_NAMES = 256
_splits: dict[str, Split] = {}
"""The last splits by name: a backward may run when their context is over."""


class Split:
    """A sequence that is dealt out to ranks.

    Args:
        ranks: the ranks.
        deal: which of them holds which positions.
    """

    def __init__(self, ranks: Ranks, deal: Deal) -> None:
        self.ranks, self.deal = ranks, deal
        self.name = f"{ranks.group.group_name} {deal.length} {deal.balanced}"
        """The same for splits that are alike: torch.compile compiles once for them."""
        _splits.pop(self.name, None)
        _splits[self.name] = self
        if len(_splits) > _NAMES:
            del _splits[next(iter(_splits))]
        self.memo: dict[str, Any] = {}
        """What ops keep until the context ends, by their name."""

    @staticmethod
    def named(name: str) -> Split:
        """The split that was last made under a name: an op takes no other objects."""
        return _splits[name]

    @property
    def mine(self) -> tuple[Piece, Piece]:
        """This rank's pieces."""
        return self.deal.pieces[self.ranks.rank]

    def ranges(self, length: int) -> Sequence[tuple[int, int]]:
        """(start, stop) of this rank's pieces; ValueError where they have another length."""
        self.check("token_ids", length)
        return [(piece.start, piece.stop) for piece in self.mine]

    def check(self, name: str, length: int) -> None:
        """ValueError unless an argument has as many positions as this rank holds."""
        held = self.deal.held(self.ranks.rank)
        if length != held:
            raise ValueError(
                f"{name} must hold this rank's {held} of {self.deal.length} positions under "
                f"context_parallel, got {length}"
            )

    def local(self, op: str, backend: str, backends: Sequence[Any], call: Any) -> Any:
        """The result of a backend on this rank alone."""
        return select(op, backend, backends, call).run(call)

    def padded(self, x: Tensor, name: str) -> Tensor:
        """Every rank's x (B, T of the rank, ...): (ranks, B, longest T, ...), the rest zeros."""
        missing = self.deal.longest - x.shape[1]
        if missing:
            x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1)
        return self.ranks.gather(name, x)

    def in_order(self, gathered: Tensor) -> Tensor:
        """(B, T, ...) in the order of positions, from (ranks, B, longest T, ...)."""
        parts = [gathered[r][:, self.deal.place(r, i)] for r, i in self.deal.in_order]
        return torch.cat(parts, 1)

    def whole(self, x: Tensor, name: str) -> Tensor:
        """The whole sequence, (B, T, ...), of which x is this rank's part."""
        return self.in_order(self.padded(x, name))

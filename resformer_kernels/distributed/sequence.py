"""How the positions of a sequence are dealt out to ranks.

A rank holds two ranges of positions, its pieces, one after the other in memory. Of n ranks, rank r
holds in the balanced form the ranges r and 2n - 1 - r out of 2n: under a causal mask every rank has
the same work. In the plain form it holds the n-th part r of the sequence, in two halves. Lengths
that do not divide make ranges that differ by one position, and may leave some empty.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from resformer_kernels._core.checks import check_flag, integer


class Piece(NamedTuple):
    """A range of positions that one rank holds."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.stop - self.start


class Deal:
    """Which rank holds which positions.

    Args:
        length: positions of the whole sequence.
        ranks: among which they are dealt out.
        balanced: as above.

    Attributes:
        pieces: the two pieces of each rank, in the order in which it holds them.
        longest: the most positions that a rank holds.
        in_order: (rank, index) of every piece, in the order of positions.
    """

    def __init__(self, length: int, ranks: int, balanced: bool) -> None:
        check_flag("balanced", balanced)
        self.length, self.ranks = integer("length", length, 0), integer("ranks", ranks, 1)
        self.balanced = balanced
        self.pieces = self._pieces()
        self.longest = max(map(self.held, range(self.ranks)))
        both = [(r, i) for r in range(self.ranks) for i in (0, 1)]
        self.in_order = sorted(both, key=lambda at: self.pieces[at[0]][at[1]])

    def _pieces(self) -> tuple[tuple[Piece, Piece], ...]:
        count = 2 * self.ranks
        bounds = [self.length * i // count for i in range(count + 1)]
        every = [Piece(a, b) for a, b in itertools.pairwise(bounds)]
        if self.balanced:
            return tuple((every[r], every[count - 1 - r]) for r in range(self.ranks))
        return tuple((every[2 * r], every[2 * r + 1]) for r in range(self.ranks))

    @property
    def everything(self) -> Piece:
        """All positions."""
        return Piece(0, self.length)

    def held(self, rank: int) -> int:
        """Number of positions that a rank holds."""
        return sum(piece.length for piece in self.pieces[rank])

    def place(self, rank: int, index: int) -> slice:
        """Where piece `index` of a rank lies in its memory."""
        first, _ = self.pieces[rank]
        return slice(0, first.length) if index == 0 else slice(first.length, self.held(rank))

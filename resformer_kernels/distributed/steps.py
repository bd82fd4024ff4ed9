"""Which part of one piece's queries attends to which part of another piece's keys."""

from __future__ import annotations

from typing import NamedTuple

from resformer_kernels.distributed.sequence import Deal, Piece


class Step(NamedTuple):
    """Attention of some rows of a piece of queries over some rows of a piece of keys.

    The window is that of the kernel, which aligns the last query with the last key; -1 is
    unbounded.
    """

    queries: slice
    keys: slice
    left: int
    right: int

    @property
    def sees_all(self) -> bool:
        """Whether every query attends to every key."""
        return self.left == self.right == -1


def step(queries: Piece, keys: Piece, left: int, right: int) -> Step | None:
    """What queries see of keys under a window in positions of the whole sequence; None: nothing.

    Rows that see nothing are left out: then the kernel's alignment can express every window.
    """
    first, last = queries.start, queries.stop - 1
    if left >= 0:
        last = min(last, keys.stop - 1 + left)
    if right >= 0:
        first = max(first, keys.start - right)
    low = keys.start if left < 0 else max(keys.start, first - left)
    high = keys.stop - 1 if right < 0 else min(keys.stop - 1, last + right)
    if first > last or low > high:
        return None
    # Distances of the last query to the first key that it sees, and of the first to the last one.
    back = -1 if left < 0 or last - left <= low else left - last + high
    ahead = -1 if right < 0 or first + right >= high else right + last - high
    return Step(
        slice(first - queries.start, last + 1 - queries.start),
        slice(low - keys.start, high + 1 - keys.start),
        back,
        ahead,
    )


class Hop(NamedTuple):
    """One move of the ring: each rank sends its piece `piece` to the rank `distance` further on."""

    distance: int
    piece: int


def needed(deal: Deal, rank: int, owner: int, index: int, left: int, right: int) -> bool:
    """Whether queries of `rank` see keys of a piece of `owner`."""
    keys = deal.pieces[owner][index]
    return any(step(queries, keys, left, right) for queries in deal.pieces[rank])


def hops(deal: Deal, left: int, right: int) -> list[Hop]:
    """The moves in which any rank needs what it would receive, the nearest ranks first.

    Every rank comes to the same list. A piece goes straight from its owner to the rank that needs
    it: under a window or the plain form's causal mask the others send and receive nothing.
    """
    every = [Hop(d, i) for d in range(1, deal.ranks) for i in (0, 1)]
    return [
        hop
        for hop in every
        if any(
            needed(deal, (owner + hop.distance) % deal.ranks, owner, hop.piece, left, right)
            for owner in range(deal.ranks)
        )
    ]

"""The steps of one ring: which rows of which piece a rank attends to, and what it sends when.

A piece goes straight from its owner to a rank that needs it, while the one before is attended to:
beside its own shard a rank holds two pieces, each half a shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from resformer_kernels.distributed.split import Split
from resformer_kernels.distributed.steps import Hop, Step, hops, needed, step
from resformer_kernels.distributed.transport import Arriving


class Shards(NamedTuple):
    """This rank's keys (B, T, Hkv, Dk), and its values or, gathered before, those of every rank,
    (ranks, B, longest T, Hkv, Dv)."""

    keys: Tensor
    values: Tensor | None
    whole: Tensor | None

    @property
    def value(self) -> Tensor:
        """The values that are there."""
        value = self.values if self.whole is None else self.whole
        assert value is not None
        return value


class Visit(NamedTuple):
    """One shard or piece to attend to. `hop` is None for this rank's own; keys and values are None
    where this rank has no need of what moves, and sees none of it."""

    steps: list[Step]
    keys: Tensor | None
    values: Tensor | None
    owner: int
    hop: Hop | None


class Ring:
    """The steps of this rank.

    Args:
        split: who holds what.
        window: (left, right) in positions of the whole sequence, -1 unbounded.
    """

    def __init__(self, split: Split, window: tuple[int, int]) -> None:
        self.ranks, self.deal, self.window = split.ranks, split.deal, window
        self.me = self.ranks.rank
        self.hops = hops(self.deal, *window)

    def own(self) -> list[Step]:
        """The steps over this rank's own shard; one takes all of it where its mask allows."""
        held = self.deal.held(self.me)
        if not held:
            return []
        # Memory is in the order of positions: on all of it these masks are the same.
        if self.window in ((-1, -1), (-1, 0)) or not self.deal.balanced:
            return [Step(slice(0, held), slice(0, held), *self.window)]
        # Every query sees its own position: the first two steps take every row once.
        pairs = ((0, 0), (1, 1), (0, 1), (1, 0))
        return [found for i, j in pairs if (found := self._step(i, self.me, j)) is not None]

    def of(self, owner: int, index: int) -> list[Step]:
        """The steps over another rank's piece, whose keys are counted from its start; one step
        where both of this rank's pieces see all of it."""
        start = self.deal.place(owner, index).start
        both = [self._step(i, owner, index) for i in (0, 1)]
        every = [x._replace(keys=_moved(x.keys, -start)) for x in both if x is not None]
        if len(every) == 2 and all(x.sees_all for x in every):
            first, second = every
            if first.queries.stop == second.queries.start and first.keys == second.keys:
                return [first._replace(queries=slice(first.queries.start, second.queries.stop))]
        return every

    def _step(self, i: int, owner: int, j: int) -> Step | None:
        """What this rank's piece i sees of piece j of owner, as places in the memory of both."""
        found = step(self.deal.pieces[self.me][i], self.deal.pieces[owner][j], *self.window)
        if found is None:
            return None
        return found._replace(
            queries=_moved(found.queries, self.deal.place(self.me, i).start),
            keys=_moved(found.keys, self.deal.place(owner, j).start),
        )

    def visit(self, shards: Shards, visit: Callable[[Visit], None]) -> None:
        """Visit this rank's shard, then each piece of the others' as it arrives."""
        arriving = self._start(0, shards)
        own = shards.value if shards.whole is None else self.stored(shards.whole, self.me, None)
        visit(Visit(self.own(), shards.keys, own, self.me, None))
        for n, hop in enumerate(self.hops):
            keys, values = (None if x is None else x.wait() for x in arriving)
            arriving = self._start(n + 1, shards)
            owner = (self.me - hop.distance) % self.ranks.count
            if shards.whole is not None:
                values = self.stored(shards.whole, owner, hop.piece)
            visit(Visit(self.of(owner, hop.piece), keys, values, owner, hop))
            # Before the next piece but one is asked for.
            del keys, values

    def _start(self, number: int, shards: Shards) -> tuple[Arriving | None, Arriving | None]:
        """Start hop `number`, where there is one: (keys, values), None where they do not move."""
        if number >= len(self.hops):
            return None, None
        hop = self.hops[number]
        values = shards.values
        return (
            self._send("k", hop, shards.keys),
            None if values is None else self._send("v", hop, values),
        )

    def _send(self, name: str, hop: Hop, shard: Tensor) -> Arriving:
        ahead, behind = self._neighbours(hop)
        gives, takes = self._needs(hop)
        piece = shard[:, self.deal.place(self.me, hop.piece)] if gives else None
        shape = self._shape(shard, behind, hop) if takes else None
        return self.ranks.swap(name, piece, ahead, shape, behind, shard)

    def give_back(self, name: str, hop: Hop, gradient: Tensor | None, shard: Tensor) -> Arriving:
        """Send the gradient of the piece that came with `hop` to its owner, and receive that of
        this rank's own; `shard` is this rank's."""
        ahead, behind = self._neighbours(hop)
        gives, takes = self._needs(hop)
        shape = self._shape(shard, self.me, hop) if gives else None
        return self.ranks.swap(name, gradient if takes else None, behind, shape, ahead, shard)

    def _neighbours(self, hop: Hop) -> tuple[int, int]:
        count = self.ranks.count
        return (self.me + hop.distance) % count, (self.me - hop.distance) % count

    def _needs(self, hop: Hop) -> tuple[bool, bool]:
        """Whether a hop takes a piece from this rank, and brings one to it."""
        ahead, behind = self._neighbours(hop)
        return (
            needed(self.deal, ahead, self.me, hop.piece, *self.window),
            needed(self.deal, self.me, behind, hop.piece, *self.window),
        )

    def _shape(self, shard: Tensor, owner: int, hop: Hop) -> tuple[int, ...]:
        return (shard.shape[0], self.deal.pieces[owner][hop.piece].length, *shard.shape[2:])

    def stored(self, whole: Tensor, owner: int, index: int | None) -> Tensor:
        """The values of a piece, or of all that a rank holds, among those of every rank."""
        place = slice(self.deal.held(owner)) if index is None else self.deal.place(owner, index)
        return whole[owner][:, place]


def _moved(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)

"""Sweeps over the pieces of a reservoir's time, until each starts from its left neighbour's end.

The rules are those by which one process takes chunks (`reservoir/README.md`, `reservoir_plan.h`),
with the ranks' pieces as the outermost chunks: all run at once from guessed starts (zero), ends are
gathered, and pieces whose start disagrees run again from the corrected one, until they meet what
they have stored. Every rank comes to the same decisions from the same numbers.

    accepted   a start that is the neighbour's end by bits; or within half the tolerance of it,
               where the piece has met its stored trajectory before
    met        within an eighth of the tolerance, every sequence at a step of its own
    forgot     False where starts come no nearer from sweep to sweep, or distances grow again by
               more than three. Pieces that may then differ from the sequential mode by a bit run
               one after another, to their ends.

A sweep is one all-gather, and the host reads its numbers. A reservoir that forgets within a piece
takes two sweeps. One that does not takes as many as there are pieces; more only where some pieces
were taken for forgetting before another showed that they do not: at most as many again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resformer_kernels.distributed.split import Split
from resformer_kernels.reservoir import reference
from resformer_kernels.reservoir.op import FORWARD
from resformer_kernels.reservoir.record import (
    AUTO,
    SEQUENTIAL,
    ReducedCall,
    ReservoirCall,
)

ACCEPTED, MEETING, REGROWN = 0.5, 0.125, 3.0
"""Shares of the tolerance, and the factor, as above."""
FIRST = 128
"""Steps of a piece that are run again before they are compared; each time twice as many."""
WORTHWHILE = 256
"""Steps of a piece from which on "auto" takes pieces at once, as with chunks."""


def at_once(split: Split, call: ReservoirCall) -> bool:
    """Whether the call's mode takes pieces at once, rather than one after another."""
    shortest = WORTHWHILE * 2 * split.deal.ranks if call.mode == AUTO else 1
    return call.mode != SEQUENTIAL and split.deal.length >= shortest


def filled(split: Split) -> list[tuple[int, int]]:
    """(rank, index) of the pieces that hold steps, in the order of time."""
    return [(r, i) for r, i in split.deal.in_order if split.deal.pieces[r][i].length]


class Info(NamedTuple):
    """A `ReservoirInfo` that the host has read."""

    chunks: float
    sweeps: float
    mismatch: float
    work: float
    forgot: float


class Found(NamedTuple):
    """What a piece's run was like: flags and numbers that all ranks are told."""

    met: float = 0
    """1: it met its stored trajectory, and its end stays."""
    exact: float = 1
    """1: from an exact start, the bits are those of the sequential mode."""
    growth: float = 1
    work: float = 0
    chunks: float = 0
    mismatch: float = 0
    forgot: float = 1


class Sweeper:
    """The forward recurrence across ranks.

    Args:
        split: who holds which pieces.
        namespace: of the ops that run pieces; empty: the reference, which has none.
        call: this rank's part, (B, T of the rank, n_in).
    """

    def __init__(self, split: Split, namespace: str, call: ReservoirCall) -> None:
        self.split, self.namespace, self.call = split, namespace, call
        self.pieces = filled(split)
        start = call.start()
        self.starts = [start, *[torch.zeros_like(start) for _ in self.pieces[1:]]]
        self.ends = [start for _ in self.pieces]
        self.states = call.inputs.new_empty((*call.inputs.shape[:-1], call.units))
        self.met = [False for _ in self.pieces]
        self.exact = [False for _ in self.pieces]
        self.sweeps, self.work, self.chunks, self.mismatch, self.forgot = 0, 0.0, 0.0, 0.0, True

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """(states of this rank (B, T of the rank, N), final state of the whole, info (5,))."""
        in_order = not at_once(self.split, self.call)
        count = len(self.pieces)
        todo = list(range(min(count, 1) if in_order else count))
        before, inside = math.inf, 0.0
        while todo:
            again = self.sweeps > 0
            found = self._sweep(todo, again, in_order)
            if not in_order:
                todo, apart, accepted = self._disagreeing()
                inside = max(inside, *(x.mismatch for x in found))
                self.mismatch = max(accepted, inside)
                nearer = not again or not todo or apart < 0.5 * before
                self.forgot = nearer and all(x.forgot and x.growth <= REGROWN for x in found)
                in_order = not self.forgot
                before = apart
            if in_order:
                todo = [p for p in range(count) if not self.exact[p]][:1]
                self.mismatch = 0.0
        final = self.ends[-1] if self.pieces else self.starts[0]
        return self.states, final.clone(), self._info()

    def before(self) -> Tensor:
        """The states before this rank's two pieces, (2, B, N)."""
        found = torch.zeros_like(torch.stack([self.starts[0]] * 2))
        for p, (rank, index) in enumerate(self.pieces):
            if rank == self.split.ranks.rank:
                found[index] = self.ends[p - 1] if p else self.starts[0]
        return found

    def _info(self) -> Tensor:
        call, deal = self.call, self.split.deal
        steps = call.sequences * deal.length
        chunks = self.chunks if at_once(self.split, call) else call.sequences
        work = self.work / steps if steps else 1.0
        numbers = (chunks if steps else 0, self.sweeps, self.mismatch, work, self.forgot)
        like = call.inputs
        return torch.stack([like.new_full((), x, dtype=torch.float64) for x in numbers])

    def _sweep(self, todo: Sequence[int], again: bool, in_order: bool) -> list[Found]:
        """Run pieces, by their places in time; what every rank found of them."""
        before = list(self.exact)
        for p in todo:
            if p > 0 and again:
                self.starts[p] = self.ends[p - 1]
        split, rank = self.split, self.split.ranks.rank
        mine = [p for p in todo if self.pieces[p][0] == rank]
        if again and not in_order:
            found = self._compared(mine)
        else:
            found = self._whole(mine, SEQUENTIAL if in_order else self.call.mode)
        told = self.starts[0].new_zeros((2, len(Found._fields)))
        ends = torch.zeros_like(torch.stack([self.starts[0]] * 2))
        for p in mine:
            index = self.pieces[p][1]
            ends[index] = self.ends[p]
            told[index] = told.new_tensor(found[p])
        message = torch.cat([ends.flatten(), told.flatten()])
        gathered = split.ranks.gather("ends", message)
        every = gathered[:, : ends.numel()].unflatten(1, ends.shape)
        flags = gathered[:, ends.numel() :].unflatten(1, told.shape).tolist()
        self.sweeps += 1
        results = []
        for p in todo:
            r, index = self.pieces[p]
            result = Found(*flags[r][index])
            self.ends[p] = every[r, index]
            self.met[p] = result.met > 0
            exact_start = p == 0 or (again and before[p - 1])
            self.exact[p] = exact_start and result.exact > 0
            self.work += result.work
            self.chunks += result.chunks if not again else 0
            results.append(result)
        return results

    def _disagreeing(self) -> tuple[list[int], float, float]:
        """(places of pieces to run again, their largest distance, the largest one accepted)."""
        if len(self.pieces) < 2:
            return [], 0.0, 0.0
        mine, theirs = torch.stack(self.starts[1:]), torch.stack(self.ends[:-1])
        apart = _largest(mine - theirs)
        limit = ACCEPTED * self.call.tolerance * _largest(theirs).clamp(min=1)
        # Of every piece, one by one for its sequences.
        numbers = torch.stack([apart, (apart <= limit).to(apart.dtype)]).double().tolist()
        todo, largest, accepted = [], 0.0, 0.0
        for p, (apart_of, near_of) in enumerate(zip(*numbers, strict=True), 1):
            most = math.nan if any(map(math.isnan, apart_of)) else max(apart_of, default=0.0)
            if most == 0:
                continue
            if self.met[p] and all(near_of):
                accepted = max(accepted, most)
            else:
                todo.append(p)
                largest = most if not most <= largest else largest
        return todo, largest, accepted

    def _segment(
        self, ranges: Sequence[tuple[int, int, int]], starts: Sequence[Tensor], mode: int
    ) -> tuple[list[Tensor], list[Tensor], Info]:
        """Run steps [begin, end) of pieces (index, begin, end) of this rank at once, as packed
        sequences: the states (B, steps, N) and the last state of each, and the info."""
        call, rank, deal = self.call, self.split.ranks.rank, self.split.deal
        inputs, device = call.inputs, call.inputs.device
        rows = [deal.place(rank, i).start for i, _, _ in ranges]
        parts = [inputs[:, at + a : at + b] for at, (_, a, b) in zip(rows, ranges, strict=True)]
        lengths = [b - a for _, a, b in ranges]
        together, batch = sum(lengths), inputs.shape[0]
        first = torch.arange(batch + 1, dtype=torch.int32, device=device) * together
        offsets = [first + sum(lengths[:k]) for k in range(len(lengths))]
        flat = torch.cat(parts, 1).flatten(0, 1) if len(parts) > 1 else parts[0].flatten(0, 1)
        packed = call._replace(
            inputs=flat,
            initial_state=torch.stack(list(starts), 1).flatten(0, 1),
            mode=mode,
            cu_seqlens=torch.stack(offsets, 1).flatten()[: batch * len(lengths) + 1],
        )
        states, final, info = _run(self.namespace, packed)
        pieces = states.unflatten(0, (batch, together)).split(lengths, 1)
        return list(pieces), list(final.unflatten(0, (batch, len(lengths))).unbind(1)), info

    def _whole(self, mine: Sequence[int], mode: int) -> dict[int, Found]:
        """Run pieces to their ends, and store their states."""
        if not mine:
            return {}
        held = [self._length(p) for p in mine]
        ranges = [(self.pieces[p][1], 0, length) for p, length in zip(mine, held, strict=True)]
        states, ends, info = self._segment(ranges, [self.starts[p] for p in mine], mode)
        exact = self._as_sequential(info, len(mine))
        found = {}
        for p, piece, end, length in zip(mine, states, ends, held, strict=True):
            self.states[:, self.split.deal.place(*self.pieces[p])] = piece
            self.ends[p] = end
            found[p] = Found(
                exact=exact,
                work=info.work * length * self.call.sequences,
                chunks=info.chunks / len(mine),
                mismatch=info.mismatch,
                forgot=info.forgot,
            )
        return found

    def _as_sequential(self, info: Info, pieces: int) -> bool:
        """Whether a local run has the bits of the sequential mode."""
        split = info.chunks > pieces * self.call.sequences
        return not split or not info.forgot or self.call.tolerance == 0

    def _length(self, p: int) -> int:
        rank, index = self.pieces[p]
        return self.split.deal.pieces[rank][index].length

    def _compared(self, mine: Sequence[int]) -> dict[int, Found]:
        """Run pieces again, in segments of growing length, until they meet what is stored."""
        found = {p: Found() for p in mine}
        far = torch.full_like(self.starts[0][:, 0], math.inf)
        trace = {p: _Trace(far, far < 0) for p in mine}
        state = {p: self.starts[p] for p in mine}
        active, at, length = list(mine), 0, FIRST
        while active:
            ranges = [(self.pieces[p][1], at, min(at + length, self._length(p))) for p in active]
            states, ends, info = self._segment(ranges, [state[p] for p in active], AUTO)
            still = []
            for p, new, end, (_, begin, stop) in zip(active, states, ends, ranges, strict=True):
                state[p] = end
                trace[p], growth, some, met = self._stored(p, begin, new, trace[p])
                # What meets by bits goes on as it would have.
                exact = self._as_sequential(info, len(active))
                exact = exact and (not some or self.call.tolerance == 0)
                so_far = found[p]
                found[p] = so_far._replace(
                    met=met,
                    exact=so_far.exact * exact,
                    growth=max(growth, so_far.growth),
                    work=so_far.work + info.work * (stop - begin) * self.call.sequences,
                    mismatch=max(so_far.mismatch, info.mismatch),
                    forgot=so_far.forgot * info.forgot,
                )
                if not met and stop < self._length(p):
                    still.append(p)
                elif not met:
                    self.ends[p] = torch.where(trace[p].met[:, None], self.ends[p], end)
            active, at, length = still, at + length, 2 * length
        return found

    def _stored(
        self, p: int, begin: int, new: Tensor, trace: _Trace
    ) -> tuple[_Trace, float, bool, bool]:
        """Store the states from step `begin` of a piece on, those of each sequence up to where they
        meet what is stored: (trace, by which factor a distance grew again before that, whether any
        sequence has met it, whether all have)."""
        at = self.split.deal.place(*self.pieces[p]).start + begin
        old = self.states[:, at : at + new.shape[1]]
        apart = (new - old).abs().amax(-1)
        limit = MEETING * self.call.tolerance * old.abs().amax(-1).clamp(min=1)
        met = torch.cat([trace.met[:, None], apart <= limit], 1).cumsum(1) > 0
        going = ~met[:, :-1]
        nearest = torch.cat([trace.nearest[:, None], apart], 1).cummin(1).values
        # NaN: of numbers that never come together.
        grown = torch.where(going, apart / nearest[:, :-1], 0).nan_to_num(math.inf, math.inf)
        most = grown.amax() if grown.numel() else apart.new_zeros(())
        numbers = torch.stack([most, *(x.to(most.dtype) for x in (met.any(), met[:, -1].all()))])
        growth, some, every = numbers.tolist()
        old.copy_(torch.where(going[..., None], new, old))
        return _Trace(nearest[:, -1], met[:, -1]), growth, some > 0, every > 0


class _Trace(NamedTuple):
    """How a piece that runs again has come to what is stored."""

    nearest: Tensor
    """The least distance of each sequence so far, (B,)."""
    met: Tensor
    """Which sequences have met it, (B,)."""


def _run(namespace: str, call: ReservoirCall) -> tuple[Tensor, Tensor, Info]:
    if namespace:
        states, final, info = FORWARD(namespace, call)
        return states, final, Info(*info.tolist())
    found, final, told = reference.run(ReducedCall(call, "none", None))
    assert isinstance(found, Tensor)
    return found, final, Info(*(float(x) for x in told))


def _largest(x: Tensor) -> Tensor:
    """The largest modulus of each row (..., N)."""
    return x.abs().amax(-1)

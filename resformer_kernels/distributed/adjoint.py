"""The backward of a reservoir whose time is split across ranks.

The adjoint is linear, so its parts add up. Every piece runs against time as if nothing came from
its right; what comes out of it goes to its left neighbour, through which it runs on alone, without
other gradients, until it is forgotten or comes out in turn. After as many sweeps as there are
pieces nothing is left. "Forgotten" is as in `sweeps.py`, in units of the largest gradient; what
grows again on its way runs to its end. Where time goes in order, each piece runs once, with all
that comes from its right. A sweep is one all-gather.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from resformer_kernels.distributed.split import Split
from resformer_kernels.distributed.sweeps import ACCEPTED, FIRST, MEETING, REGROWN, filled
from resformer_kernels.reservoir import reference
from resformer_kernels.reservoir.op import BACKWARD, LEAVES
from resformer_kernels.reservoir.record import BackwardCall, ReducedCall, ReservoirCall

_INITIAL = 1 << LEAVES.index("initial_state")


def run_back(namespace: str, call: BackwardCall) -> dict[str, Tensor]:
    """The gradients that are wanted, by the names of their leaves, by the ops of `namespace`;
    empty: the reference, which has none."""
    wanted = [name for bit, name in enumerate(LEAVES) if call.grad_mask >> bit & 1]
    if namespace:
        found = dict(zip(LEAVES, BACKWARD(namespace, call), strict=True))
        return {name: found[name] for name in wanted}
    with torch.enable_grad():
        leaves = {name: getattr(call.scan, name).detach() for name in wanted}
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        scan = ReducedCall(call.scan._replace(**leaves), "none", None)
        states, final, _ = reference.run(scan)
    pairs = ((states, call.grad_states), (final, call.grad_final))
    outputs, given = zip(*(pair for pair in pairs if pair[1] is not None), strict=True)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), given, materialize_grads=True)
    return dict(zip(wanted, gradients, strict=True))


class Saved(Protocol):
    """What the backward has, (see `reservoir.py`)."""

    @property
    def grad_states(self) -> Tensor | None:
        """Of this rank's states; None: zeros."""

    @property
    def states(self) -> Tensor:
        """Of this rank, (B, T of the rank, N)."""

    @property
    def before(self) -> Tensor:
        """The states before its pieces, (2, B, N)."""

    @property
    def grad_mask(self) -> int:
        """Which of LEAVES want a gradient."""


class Adjoint:
    """The adjoint recurrence, and the sums of what it gives the leaves.

    Args:
        namespace: of the ops that run pieces; empty: the reference.
        split: who holds which pieces.
        call: this rank's part of the call; `mode` is that of the backward.
        saved: what the forward has left.
    """

    def __init__(self, namespace: str, split: Split, call: ReservoirCall, saved: Saved) -> None:
        self.namespace, self.call = namespace, call
        self.states, self.before = saved.states, saved.before
        self.grad, self.mask = saved.grad_states, saved.grad_mask
        self.ranks, self.deal = split.ranks, split.deal
        self.pieces = filled(split)
        self.first = torch.zeros_like(saved.before[0])
        """What has come out of the first piece, on the rank that holds it."""
        self.found: dict[str, Tensor] = {}
        for bit, name in enumerate(LEAVES):
            if self.mask >> bit & 1 and name != "initial_state":
                leaf = getattr(call, name)
                wide = leaf.dtype if name == "inputs" else torch.float64
                self.found[name] = torch.zeros_like(leaf, dtype=wide)

    def leaves(self) -> tuple[Tensor, ...]:
        """This rank's parts of the gradients, in the order of LEAVES; empty: not wanted."""
        found = self.found | ({"initial_state": self.first} if self.mask & _INITIAL else {})
        return tuple(
            found[name].to(getattr(self.call, name).dtype)
            if name in found
            else self.states.new_empty((0,))
            for name in LEAVES
        )

    def in_order(self, grad_final: Tensor) -> None:
        """Every piece once, from the last one on."""
        # Every rank has the final state, and uses of it; all count.
        carry = self.ranks.sum("adjoints", grad_final)
        for p in reversed(range(len(self.pieces))):
            rank, index = self.pieces[p]
            out = torch.zeros_like(carry)
            if rank == self.ranks.rank:
                out = self._back(p, 0, self._length(p), carry, self._given(index))
            carry = self.ranks.gather("adjoints", out)[rank] if p else out
        if not self.pieces and self.deal.in_order[0][0] != self.ranks.rank:
            carry = torch.zeros_like(carry)
        self.first = carry

    def at_once(self, grad_final: Tensor) -> None:
        """Every piece at once, then what comes out of each through those before it."""
        count = len(self.pieces)
        mine = [p for p in range(count) if self.pieces[p][0] == self.ranks.rank]
        out = {}
        if self.grad is not None:
            for p in mine:
                given = self._given(self.pieces[p][1])
                out[p] = self._back(p, 0, self._length(p), torch.zeros_like(self.first), given)
        most = _largest(grad_final[:0]) if self.grad is None else _largest(self.grad)
        extra = torch.cat([grad_final.flatten(), most.to(grad_final.dtype)[None]])
        arriving, rest = self._exchange(out, extra)
        total = rest[:, :-1].sum(0).view(grad_final.shape)
        arriving[-1] = total
        largest = torch.maximum(rest[:, -1].amax(), _largest(total))
        tolerance = self.call.tolerance * float(largest)
        forgets = [False] * count
        while todo := self._above(arriving, forgets, ACCEPTED * tolerance):
            out = {}
            flags = self.first.new_zeros(2)
            for p in mine:
                if p not in todo:
                    continue
                left = self._alone(p, arriving[p], MEETING * tolerance)
                flags[self.pieces[p][1]] = left is None
                if left is not None:
                    out[p] = left
            arriving, told = self._exchange(out, flags)
            for p in todo:
                rank, index = self.pieces[p]
                forgets[p] = bool(told[rank, index])

    def _above(self, arriving: list[Tensor], forgets: list[bool], limit: float) -> list[int]:
        """Pieces through which what arrives has to run: all but zeros, and what is small where the
        piece has forgotten before. NaN runs."""
        sizes = torch.stack([_largest(x) for x in arriving]).tolist()
        return [
            p
            for p, (size, forgot) in enumerate(zip(sizes, forgets, strict=True))
            if not size <= (limit if forgot else 0.0)
        ]

    def _exchange(self, out: dict[int, Tensor], extra: Tensor) -> tuple[list[Tensor], Tensor]:
        """(what arrives at each piece, every rank's extra numbers (ranks, n)) where these came out
        of this rank's pieces."""
        sent = torch.zeros_like(self.before)
        for p, x in out.items():
            sent[self.pieces[p][1]] = x
        if 0 in out:
            self.first = self.first + out[0]
        gathered = self.ranks.gather("adjoints", torch.cat([sent.flatten(), extra]))
        every = gathered[:, : sent.numel()].unflatten(1, sent.shape)
        arriving = [every[rank, index] for rank, index in self.pieces[1:]]
        return [*arriving, torch.zeros_like(self.first)], gathered[:, sent.numel() :]

    def _alone(self, p: int, carry: Tensor, limit: float) -> Tensor | None:
        """What arrived, and no other gradient, through a piece: what comes out, or None where it is
        forgotten."""
        least, stop, steps, regrown = float(_largest(carry)), self._length(p), FIRST, False
        while stop > 0:
            begin = max(0, stop - steps)
            carry = self._back(p, begin, stop, carry, None)
            size = float(_largest(carry))
            regrown = regrown or not size <= REGROWN * least
            if size <= limit and not regrown:
                return None
            least, stop, steps = min(least, size), begin, 2 * steps
        return carry

    def _given(self, index: int) -> Tensor | None:
        place = self.deal.place(self.ranks.rank, index)
        return None if self.grad is None else self.grad[:, place]

    def _back(self, p: int, begin: int, stop: int, carry: Tensor, grad: Tensor | None) -> Tensor:
        """Steps [begin, stop) of a piece of this rank, to which `carry` comes from the right; adds
        to the leaves' gradients and returns what comes out at the left."""
        rank, index = self.pieces[p]
        at = self.deal.place(rank, index).start
        steps = slice(at + begin, at + stop)
        before = self.states[:, at + begin - 1] if begin else self.before[index]
        scan = self.call._replace(
            inputs=self.call.inputs[:, steps], initial_state=before.contiguous()
        )
        call = BackwardCall(grad, carry, scan, self.states[:, steps], self.mask | _INITIAL)
        found = run_back(self.namespace, call)
        for name, total in self.found.items():
            if name == "inputs":
                total[:, steps] += found[name]
            else:
                total += found[name]
        return found["initial_state"]

    def _length(self, p: int) -> int:
        rank, index = self.pieces[p]
        return self.deal.pieces[rank][index].length


def _largest(x: Tensor) -> Tensor:
    """The largest modulus, 0 of nothing."""
    return x.abs().amax() if x.numel() else x.new_zeros(())

"""The one place where tensors are handed to torch.distributed, and where their bytes are counted.

Two moves serve everything: `swap`, in which each rank sends one tensor to one rank and receives one
from another, and `gather`. Both go through torch's functional collectives: they start at once,
and are waited for where their result is first asked for. Sums across ranks are made from what was
gathered or swapped, in the order of the ranks: the same bits in every run.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh

from resformer_kernels._core.checks import describe


class Traffic:
    """What this rank handed to torch.distributed.

    Attributes:
        sent: bytes for other ranks, by what they hold: "k", "v", "dk", "carries", ...
        calls: collectives, by the same names.
        most_held: the most bytes of received pieces that were in memory at once.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.most_held = 0
        self._held = 0

    def hold(self, size: int) -> None:
        """Count bytes that are received into memory, or, below 0, given up."""
        self._held += size
        self.most_held = max(self.most_held, self._held)


# Its name before torch 2.13.
_gather = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor

_watching: list[Traffic] = []


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what this rank hands to torch.distributed, outside of compiled graphs."""
    found = Traffic()
    _watching.append(found)
    try:
        yield found
    finally:
        _watching.remove(found)


def _count(name: str, size: int) -> None:
    if torch.compiler.is_compiling():
        return
    for watching in _watching:
        watching.sent[name] += size
        watching.calls[name] += 1


class Ranks:
    """The ranks that share a sequence.

    Args:
        group: their process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.count, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def swap(
        self,
        name: str,
        x: Tensor | None,
        to: int,
        received: Sequence[int] | None,
        of: int,
        like: Tensor,
    ) -> Arriving:
        """Send x to rank `to` and receive a tensor from rank `of`; None sends, or receives, none.

        Args:
            name: of what is sent, for `Traffic`.
            x: any shape, of like's dtype and device.
            received: the shape of what arrives.
            like: a tensor.
        """
        sizes, arriving = [0] * self.count, [0] * self.count
        flat = like.new_empty(0) if x is None else x.contiguous().view(-1)
        sizes[to] = flat.numel()
        if received is not None:
            arriving[of] = torch.Size(received).numel()
        _count(name, flat.nbytes)
        buffer = functional.all_to_all_single(flat, arriving, sizes, self.group)
        watching = [] if torch.compiler.is_compiling() or received is None else list(_watching)
        for each in watching:
            each.hold(buffer.nbytes)
        return Arriving(buffer, received, watching)

    def gather(self, name: str, x: Tensor) -> Tensor:
        """x of every rank, which has one shape on all of them: (ranks, *x.shape)."""
        _count(name, x.nbytes * (self.count - 1))
        whole: Tensor = functional.wait_tensor(_gather(x.contiguous()[None], 0, self.group))
        return whole

    def sum(self, name: str, x: Tensor) -> Tensor:
        """The sum of x over the ranks, in their order."""
        return self.gather(name, x).sum(0)

    def scatter_sum(self, name: str, x: Tensor) -> Tensor:
        """x (ranks, ...) holds a part for each rank: the sum of this rank's parts, in order."""
        _count(name, x.nbytes // self.count * (self.count - 1))
        even = [x[0].numel()] * self.count
        parts = functional.all_to_all_single(x.contiguous().view(-1), even, even, self.group)
        return functional.wait_tensor(parts).view(x.shape).sum(0)


class Arriving:
    """A tensor on its way."""

    def __init__(
        self, buffer: Tensor, shape: Sequence[int] | None, watching: Sequence[Traffic]
    ) -> None:
        self._buffer, self._shape, self._watching = buffer, shape, watching

    def wait(self) -> Tensor | None:
        """The tensor; None where none was sent."""
        buffer = functional.wait_tensor(self._buffer)
        if self._shape is None:
            return None
        received = buffer.view(*self._shape)
        for each in self._watching:
            weakref.finalize(received, each.hold, -received.nbytes)
        return received


def ranks_of(mesh: Any) -> Ranks:
    """The ranks of a one-dimensional DeviceMesh, or of a process group."""
    if isinstance(mesh, dist.ProcessGroup):
        return Ranks(mesh)
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh or a ProcessGroup, got {describe(mesh)}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one axis, such as mesh['cp'], got {mesh.ndim}")
    return Ranks(mesh.get_group())

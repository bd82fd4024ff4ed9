"""The package's Triton kernels on CPU tensors, run by the executor for a GPU that is not there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from resformer_kernels._triton import available, launch
from resformer_kernels._triton.launch import Launch
from tests.gpu_on_cpu.executor import Report, Schedule, nothing_written
from tests.gpu_on_cpu.launches import Edit, execute
from tests.gpu_on_cpu.limits import LIMITS, Limits


class Executed(NamedTuple):
    """A launch that was run."""

    kernel: str
    grid: tuple[int, ...]
    report: Report
    seconds: float


class _Fresh(NamedTuple):
    """Memory that a launcher allocated, and which bytes of it kernels wrote."""

    storage: StorageWeakRef
    marks: Tensor
    version: int
    """Of its tensors, before an op of torch wrote to one of them."""


class Emulation:
    """What runs launches, one after the other. Between them it remembers which bytes kernels wrote
    of what launchers allocated; where torch wrote to a tensor, all of its memory counts as written.
    """

    def __init__(
        self, capability: int, limits: Limits, schedule: Schedule, edit: Edit | None
    ) -> None:
        self._capability, self._limits = capability, limits
        self._schedule, self._edit = schedule, edit
        self._fresh: dict[int, _Fresh] = {}
        """By the number of its storage, which is not used again while there is a weak reference."""
        self.executed: list[Executed] = []

    def allocated(self, fresh: Tensor) -> None:
        """Take note of memory that nobody wrote."""
        self._fresh = {key: x for key, x in self._fresh.items() if not x.storage.expired()}
        storage = fresh.untyped_storage()
        (marks,) = nothing_written(fresh).values()
        self._fresh[storage._cdata] = _Fresh(StorageWeakRef(storage), marks, fresh._version)

    def run(self, given: Launch) -> None:
        """Run a launch."""
        start = time.perf_counter()
        report = execute(
            given,
            self._capability,
            limits=self._limits,
            written=self._marks,
            schedule=self._schedule,
            edit=self._edit,
        )
        seconds = time.perf_counter() - start
        self.executed.append(Executed(given.kernel.__name__, given.grid, report, seconds))

    def _marks(self, tensor: Tensor) -> Tensor | None:
        """Which bytes of a tensor's storage somebody wrote; None: all."""
        key = tensor.untyped_storage()._cdata
        found = self._fresh.get(key)
        if found is not None and tensor._version != found.version:
            del self._fresh[key]
            return None
        return None if found is None else found.marks


@contextmanager
def emulated(
    capability: int,
    schedule: Schedule = Schedule(),  # noqa: B008 - immutable
    edit: Edit | None = None,
    *,
    multiprocessors: int | None = None,
) -> Iterator[Emulation]:
    """Within it the package's Triton launchers take CPU tensors, choose for a GPU of that compute
    capability (major * 10 + minor), and the executor runs what they launch.

    Args:
        edit: changes the PTX of every kernel.
        multiprocessors: fewer than that GPU's, for launches that fill it with few blocks.
    """
    limits = LIMITS[capability]
    if multiprocessors is not None:
        limits = limits._replace(multiprocessors=multiprocessors)
    found = Emulation(capability, limits, schedule, edit)
    with (
        launch.assumed_capability(divmod(capability, 10), limits.multiprocessors),
        launch.launched_by(found.run, found.allocated),
        available.served_on_cpu(),
    ):
        yield found

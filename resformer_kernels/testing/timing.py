"""Time several ways to do one thing, alternating, in one process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from resformer_kernels.testing import fresh_pages

OURS = "ours"
"""The contestant that this package provides; every other one is a peer."""

MIN_SAMPLES = 7

Timer: TypeAlias = Callable[[Callable[[], object], int], float]
"""timer(call, repeats) runs `call` that often and gives the seconds that one took."""


class Benchmark(Protocol):
    """One thing to time. `contestants()` allocates the inputs, and is called once."""

    @property
    def name(self) -> str:
        """Unique, stable, in words: recorded results are found by it."""

    @property
    def group(self) -> str:
        """The heading that the case stands under."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs."""

    @property
    def flops(self) -> int:
        """Useful operations of one call; 0 where traffic is what counts."""

    @property
    def bytes(self) -> int:
        """What one call must read and write at least."""

    def contestants(self) -> Mapping[str, Callable[[], object]]:
        """Ways to make the call, by name; `OURS` is among them."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one contestant."""

    samples: tuple[float, ...]
    fresh_pages: tuple[float, ...] = ()
    """Pages a call touched for the first time, in each sample; none where nobody counted."""

    @property
    def disturbed(self) -> int:
        """Samples in which a call touched more than a few fresh pages: they time the system."""
        return sum(pages > fresh_pages.FEW for pages in self.fresh_pages)

    @property
    def median(self) -> float:
        """The median sample, seconds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / 2 / self.median


@dataclass(frozen=True)
class Result:
    """The timings of one benchmark. Its peer is the fastest of the peers."""

    name: str
    group: str
    dtype: str
    flops: int
    bytes: int
    timings: dict[str, Timing]

    @property
    def ours(self) -> Timing:
        """This package's timing."""
        return self.timings[OURS]

    @property
    def peer(self) -> str:
        """The fastest peer's name."""
        peers = (name for name in self.timings if name != OURS)
        return min(peers, key=lambda name: self.timings[name].median)

    @property
    def ratio(self) -> float:
        """How many times faster than its fastest peer: the ratio of the medians."""
        return self.timings[self.peer].median / self.ours.median


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    *,
    samples: int = MIN_SAMPLES,
    min_sample_s: float = 0.05,
    timer: Timer | None = None,
    settle_rounds: int = 0,
) -> dict[str, Timing]:
    """Time each contestant, one sample each in turn, so that drift meets all of them alike.

    Args:
        contestants: what to call, by name.
        samples: samples of each; at least 2.
        min_sample_s: a sample repeats its call until about this many seconds have passed.
        timer: how a call is timed (default: by the clock of the host).
        settle_rounds: before the first sample, at most so many rounds of one call each, until in
            one of them nobody touches fresh pages (see `fresh_pages.freed_memory_kept`).

    Returns:
        The seconds a call in every sample, by name.
    """
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")
    timer = timer or host_timer
    repeats = {
        name: max(1, round(min_sample_s / _warm(call, timer, min_sample_s)))
        for name, call in contestants.items()
    }
    _settle(contestants, settle_rounds)
    collected: dict[str, list[float]] = {name: [] for name in contestants}
    pages: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(samples):
            for name in order:
                before = fresh_pages.touched()
                collected[name].append(timer(contestants[name], repeats[name]))
                pages[name].append((fresh_pages.touched() - before) / repeats[name])
            # Nobody always runs in the cache and the heat that the same neighbour leaves.
            order.append(order.pop(0))
    finally:
        if enabled:
            gc.enable()
    return {name: Timing(tuple(collected[name]), tuple(pages[name])) for name in contestants}


def measure(
    benchmark: Benchmark,
    *,
    samples: int = MIN_SAMPLES,
    min_sample_s: float = 0.05,
    settle_rounds: int = 0,
) -> Result:
    """`alternate` on the contestants of `benchmark`."""
    timings = alternate(
        benchmark.contestants(),
        samples=samples,
        min_sample_s=min_sample_s,
        settle_rounds=settle_rounds,
    )
    return Result(
        benchmark.name,
        benchmark.group,
        str(benchmark.dtype).removeprefix("torch."),
        benchmark.flops,
        benchmark.bytes,
        timings,
    )


def _warm(call: Callable[[], object], timer: Timer, min_sample_s: float) -> float:
    call()
    found = timer(call, 1)
    if found < min_sample_s:
        found = min(found, timer(call, 1))
    return max(1e-9, found)


def _settle(contestants: Mapping[str, Callable[[], object]], rounds: int) -> None:
    for _ in range(rounds):
        most = 0
        for call in contestants.values():
            before = fresh_pages.touched()
            call()
            most = max(most, fresh_pages.touched() - before)
        if most <= fresh_pages.FEW:
            return


def host_timer(call: Callable[[], object], repeats: int) -> float:
    """Seconds a call, by the clock of the host."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats

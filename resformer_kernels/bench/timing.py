"""Time several implementations of one thing, alternating, in one process."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from resformer_kernels.bench import fresh_pages
from resformer_kernels.testing.inputs import dtype_name

OURS = "ours"
"""The contestant that this package provides; every other one is a peer."""
PLAIN = "ours, plain"
"""Our call without a part of what the case does: no peer."""

MIN_SAMPLES = 7

Timer: TypeAlias = Callable[[Callable[[], object], int], float]
"""timer(call, repeats) runs `call` that often and gives the seconds that one took."""


Call: TypeAlias = Callable[[], object]


class Unavailable(RuntimeError):
    """A contestant that this machine cannot run: no fault."""


class Benchmark(Protocol):
    """One thing to time. `makers()` is cheap: inputs are allocated by what it returns."""

    @property
    def name(self) -> str:
        """Unique and stable: stored results are found by it."""

    @property
    def group(self) -> str:
        """The heading of the case."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the inputs."""

    @property
    def flops(self) -> int:
        """Useful operations of one call; 0 where memory traffic is what counts."""

    @property
    def bytes(self) -> int:
        """The least that one call reads and writes."""

    def makers(self) -> Mapping[str, Callable[[], Call]]:
        """The maker of each contestant's call, by name; `OURS` is among them.

        A maker raises `Unavailable` where this machine lacks something, or where the call would
        take more memory or time than a comparison is worth.
        """


@dataclass(frozen=True)
class Timing:
    """Seconds a call of one contestant."""

    samples: tuple[float, ...]
    fresh_pages: tuple[float, ...] = ()
    """Pages that a call touched for the first time, in each sample; empty where not counted."""

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
    absent: dict[str, str] = field(default_factory=dict)
    """Peers that did not take part, with the reason."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """Memory that one call takes beyond what was there before it, by contestant."""

    @property
    def ours(self) -> Timing:
        """This package's timing."""
        return self.timings[OURS]

    @property
    def peers(self) -> list[str]:
        """Peers that took part, the fastest first."""
        found = (name for name in self.timings if name not in (OURS, PLAIN))
        return sorted(found, key=lambda name: self.timings[name].median)

    @property
    def peer(self) -> str:
        """The fastest peer's name; ValueError where none took part."""
        if not self.peers:
            raise ValueError(f"no peer took part in {self.name}")
        return self.peers[0]

    @property
    def ratio(self) -> float:
        """How many times faster than its fastest peer: the ratio of the medians."""
        return self.timings[self.peer].median / self.ours.median


def timed_call(
    outputs: Callable[[], Any],
    leaves: Sequence[Tensor],
    direction: str,
    grad: Tensor | None = None,
) -> Call:
    """A call that runs `outputs` forward, or the gradient of every leaf through it.

    Of a tuple of outputs the first one counts. `grad` is its gradient (default: random).
    """

    def first() -> Tensor:
        found = outputs()
        result: Tensor = found[0] if isinstance(found, tuple) else found
        return result

    if direction == "forward":
        return torch.no_grad()(first)
    for leaf in leaves:
        leaf.requires_grad_()
    result = first()
    given = torch.randn_like(result) if grad is None else grad
    return lambda: torch.autograd.grad(result, leaves, given, retain_graph=True)


def alternate(
    contestants: Mapping[str, Callable[[], object]],
    *,
    samples: int = MIN_SAMPLES,
    min_sample_s: float = 0.05,
    timer: Timer | None = None,
    settle_rounds: int = 0,
) -> dict[str, Timing]:
    """Time each contestant, one sample each in turn, so that drift meets all of them alike. Each
    starts a round in turn, and the others follow in an order that is drawn for every round.

    Args:
        contestants: what to call, by name.
        samples: samples of each; at least 2.
        min_sample_s: a sample repeats its call until about this many seconds have passed.
        timer: how a call is timed (default: by the clock of the host).
        settle_rounds: before the first sample, at most so many rounds of one call each, until in
            one of them no call touches fresh pages (see `fresh_pages.freed_memory_kept`).

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
    names = list(contestants)
    draw = random.Random(0)
    enabled = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(samples):
            # No contestant always runs after the same neighbour, in its cache, its heat and the
            # threads that it leaves spinning.
            first = names[round_ % len(names)]
            for name in (first, *draw.sample([n for n in names if n != first], len(names) - 1)):
                before = fresh_pages.touched()
                collected[name].append(timer(contestants[name], repeats[name]))
                pages[name].append((fresh_pages.touched() - before) / repeats[name])
    finally:
        if enabled:
            gc.enable()
    return {name: Timing(tuple(collected[name]), tuple(pages[name])) for name in contestants}


def wanted(names: Sequence[str], peers: Sequence[str] | None) -> list[str]:
    """Peers in `names` that contain one of `peers`, in any case; None: all."""
    found = [name for name in names if name != OURS]
    if peers is None:
        return found
    return [name for name in found if any(text.lower() in name.lower() for text in peers)]


def measure(
    benchmark: Benchmark,
    *,
    samples: int = MIN_SAMPLES,
    min_sample_s: float = 0.05,
    settle_rounds: int = 0,
    peers: Sequence[str] | None = None,
    peak: Callable[[Call], int] | None = None,
) -> Result:
    """`alternate` on the contestants of `benchmark`.

    Args:
        benchmark: what to time.
        samples: of each contestant.
        min_sample_s: see `alternate`.
        settle_rounds: see `alternate`.
        peers: only peers whose name contains one of these; None: all.
        peak: measures the bytes that one call takes; None: memory is not measured.
    """
    makers = benchmark.makers()
    chosen = [OURS, *wanted(list(makers), peers)]
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        if name not in chosen:
            continue
        try:
            call = make()
            if name != OURS:
                call()
        except Exception as error:
            # An error of ours is a fault; that of a peer is noted, and the others are timed.
            if name == OURS:
                raise
            absent[name] = str(error) if isinstance(error, Unavailable) else _failure(error)
        else:
            calls[name] = call
    timings = alternate(
        calls, samples=samples, min_sample_s=min_sample_s, settle_rounds=settle_rounds
    )
    memory = {} if peak is None else {name: peak(call) for name, call in calls.items()}
    return Result(**about(benchmark), timings=timings, absent=absent, peak_bytes=memory)


def about(benchmark: Benchmark) -> dict[str, Any]:
    """The fields that a result takes from its benchmark."""
    same = {name: getattr(benchmark, name) for name in ("name", "group", "flops", "bytes")}
    return {**same, "dtype": dtype_name(benchmark.dtype)}


def _failure(error: Exception) -> str:
    """The error in one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"failed: {type(error).__name__}: {first.strip()}"[:200]


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

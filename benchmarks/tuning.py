"""`resformer-kernels tune`: try configurations of attention's Triton kernels on a GPU.

Several configurations at a time are compiled and compared with the reference; then each is timed
alone. Entries that time does not reach stay as they are in the table.
"""

from __future__ import annotations

import functools
import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import tuning_space as space
from benchmarks.device.common import TOLERANCE, Settings, relative_distance, tensors
from benchmarks.device.timer import timer_for
from benchmarks.supervisor import Job, Outcome
from benchmarks.tuning_space import Config, Point, Trial
from resformer_kernels import value_residual_attention
from resformer_kernels._triton import arch
from resformer_kernels.bench.attention import AttentionBenchmark
from resformer_kernels.bench.timing import Call, alternate, timed_call
from resformer_kernels.testing.poison import environment

TRY, TIME, PLACE = "tune try", "tune time", "tune place"
"""Kinds of job: compile and compare; time; time both placements of the mix."""

_TRY_SECONDS, _TIME_SECONDS, _PLACE_SECONDS = 90.0, 30.0, 60.0
_SAMPLE_SECONDS = 0.002
_TOKENS, _LENGTH, _WIDTH, _WINDOW = 16384, 4096, 2048, 1024
_TINY_TOKENS, _TINY_LENGTH, _TINY_WIDTH = 32, 32, 64
"""Tokens in all, of a sequence, and heads times head_dim."""
MIX = "RESFORMER_MIX"
PLACES = ("inline", "prologue")
"""Where V' is mixed."""


@dataclass
class Search:
    """Results of the trials so far."""

    architecture: str
    table: space.Table
    failures: list[str] = field(default_factory=list)
    """Failures of the table's own configurations, which are worse than slow."""
    tried: list[Trial] = field(default_factory=list)
    """Trials that compiled and were right."""
    seconds: dict[Point, dict[Trial, float]] = field(default_factory=dict)
    placements: dict[int, dict[int, tuple[float, float]]] = field(default_factory=dict)
    """Seconds with the mix inline, and with a prologue, by head_dim and rows a KV head."""
    unfinished: int = 0

    def add(self, outcome: Outcome) -> Job | None:
        """Take note of a job; none follows."""
        job, result = outcome.job, outcome.result
        if outcome.unfinished:
            self.unfinished += 1
        elif job.kind == PLACE:
            if result is not None:
                head_dim, rows = job.payload
                both = (result["inline"], result["prologue"])
                self.placements.setdefault(head_dim, {})[rows] = both
        elif result is None or result["wrong"]:
            # Many other configurations are expected not to fit.
            if job.payload == self._own(job.payload.point):
                self.failures.append(f"{job.name}: {result['wrong'] if result else outcome.error}")
        elif job.kind == TRY:
            self.tried.append(job.payload)
        else:
            self.seconds.setdefault(job.payload.point, {})[job.payload] = result["seconds"]
        return None

    def _own(self, point: Point) -> Trial:
        return Trial(point, space.current(self.table, self.architecture, point))

    def winners(self) -> dict[Point, Config]:
        """The configurations to put into the table, of the points whose own was timed."""
        own = {point: self._own(point) for point in self.seconds}
        best = {
            point: space.best(seconds, own[point])
            for point, seconds in self.seconds.items()
            if own[point] in seconds
        }
        return {point: trial.config for point, trial in best.items() if trial != own[point]}

    def new_table(self) -> space.Table:
        """The table with what won."""
        placements = {
            head_dim: space.inline_rows(seconds) for head_dim, seconds in self.placements.items()
        }
        return space.updated(self.table, self.architecture, self.winners(), placements)


Supervise = Callable[[Sequence[Job], int, float, Callable[[Outcome], Job | None]], None]
"""supervise(jobs, workers at a time, until, on_outcome)."""


def run(
    search: Search,
    points: Sequence[Point],
    budget_s: float,
    supervise: Supervise,
    *,
    workers: int,
    progress: Callable[[str, int, int], None],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Fill `search` within `budget_s` seconds: try, time, and place the mix."""
    begun = clock()
    lists = [space.candidates(search.table, search.architecture, point) for point in points]
    head_dims = dict.fromkeys(point.head_dim for point in points)
    place = [
        Job(PLACE, f"{head_dim} {rows}", _PLACE_SECONDS, payload=(head_dim, rows))
        for head_dim in head_dims
        for rows in space.PLACEMENT_ROWS
    ]

    def phase(name: str, jobs: Sequence[Job], at_once: int, share: float) -> None:
        done = 0

        def take(outcome: Outcome) -> Job | None:
            nonlocal done
            done += 1
            search.add(outcome)
            progress(name, done, len(jobs))
            return None

        if jobs:
            supervise(jobs, at_once, begun + share * budget_s, take)

    trials = [Job(TRY, t.name, _TRY_SECONDS, payload=t) for t in space.in_turn(lists)]
    phase("compiled and compared", trials, workers, 0.6)
    good = [Job(TIME, t.name, _TIME_SECONDS, payload=t) for t in search.tried]
    # The table's own first: without it nothing can be replaced.
    own = {trials[0].name for trials in lists}
    good.sort(key=lambda job: job.name not in own)
    phase("timed", good, 1, 0.9)
    phase("placements timed", place, 1, 1.0)


def run_job(job: Job, settings: Settings) -> dict[str, Any]:
    """Do one of this module's jobs, on the device."""
    if job.kind == PLACE:
        head_dim, rows = job.payload
        return _place(head_dim, rows, settings)
    trial: Trial = job.payload
    with configured(trial, architecture(settings.device)):
        if job.kind == TRY:
            return {"wrong": _compare(trial.point, settings)}
        return {"wrong": "", "seconds": _seconds({"": _call(trial.point, settings)}, settings)[""]}


def architecture(device: str) -> str:
    """The table's name for the device's architecture, or for the stand-in's without a GPU."""
    cuda = torch.device(device).type == "cuda"
    capability = torch.cuda.get_device_capability(device) if cuda else arch.STAND_IN
    return arch.architecture(capability).name


def configs() -> Any:
    """attention/triton/configs.py."""
    return importlib.import_module("resformer_kernels.attention.triton.configs")


@contextmanager
def configured(trial: Trial, architecture: str) -> Iterator[None]:
    """Within it, the trial's configuration stands in the table of this process."""
    point = trial.point
    by_precision = configs().table()[architecture][point.direction]
    by_mask: dict[str, list[int]] = by_precision[point.precision][str(point.head_dim)]
    before = dict(by_mask)
    by_mask[point.mask] = list(trial.config)
    tape = importlib.import_module("resformer_kernels._triton.tape")
    tape.forget()
    try:
        yield
    finally:
        by_mask.clear()
        by_mask.update(before)
        tape.forget()


WANTED: dict[str, tuple[int, ...]] = {"forward": (), "keys": (1, 2, 3, 4, 5), "queries": (0,)}
"""The leaves whose gradients each kernel makes."""


@functools.lru_cache(maxsize=2)
def _drawn(case: AttentionBenchmark) -> tuple[list[Tensor], Tensor]:
    return case.leaves(), case.grad()


def benchmark(point: Point, settings: Settings, length: int | None = None) -> AttentionBenchmark:
    """The call that a point's configurations are tried on."""
    tokens, width = (_TINY_TOKENS, _TINY_WIDTH) if settings.tiny else (_TOKENS, _WIDTH)
    length = length or (_TINY_LENGTH if settings.tiny else _LENGTH)
    heads = max(1, width // point.head_dim)
    return AttentionBenchmark(
        *(max(1, tokens // length), heads, heads, length, point.head_dim),
        torch.bfloat16 if point.precision == "half" else torch.float32,
        "forward" if point.direction == "forward" else "backward",
        window=_WINDOW if point.mask == "window" else None,
        causal=point.mask == "causal",
        device=settings.device,
    )


def _call(
    point: Point,
    settings: Settings,
    *,
    backend: str = "triton",
    length: int | None = None,
    sequences: int | None = None,
) -> Call:
    """Forward at a point, or the gradients of its kernel; of the first `sequences` alone."""
    case = benchmark(point, settings, length)
    leaves, grad = _drawn(case)
    leaves = [x[:sequences].detach() if x.dim() else x.detach() for x in leaves]
    attend = functools.partial(value_residual_attention, *leaves, **case.options(), backend=backend)
    wanted = [leaves[place] for place in WANTED[point.direction]]
    return timed_call(attend, wanted, case.direction, grad[:sequences])


def _compare(point: Point, settings: Settings) -> str:
    """The error in a configuration's results; "" where they are right. The keys of a tile of
    forward hold for the kernel that mixes inline too, so that both run."""
    call = _call(point, settings)
    if point.direction != "forward":
        return _difference(point, call, settings)
    wrong = ""
    for placement in PLACES:
        with environment(MIX, placement):
            wrong = wrong or _difference(point, call, settings)
    return wrong


def _difference(point: Point, call: Call, settings: Settings) -> str:
    found = tensors(call())
    for place, (mine, true) in enumerate(zip(found, _expected(point, settings), strict=True)):
        # The gradients of scalars are cancelling sums: no measure of a kernel in one number.
        if mine.dim() == 0:
            continue
        distance = relative_distance(mine[:1], true)
        if not distance <= TOLERANCE:
            return f"result {place} is off by {distance:.3f}"
    return ""


@functools.lru_cache(maxsize=2)
def _expected(point: Point, settings: Settings) -> Sequence[Tensor]:
    """The reference's results for the first sequence."""
    return tensors(_call(point, settings, backend="reference", sequences=1)())


def _seconds(calls: dict[str, Call], settings: Settings) -> dict[str, float]:
    timings = alternate(
        calls,
        samples=settings.samples,
        min_sample_s=_SAMPLE_SECONDS,
        timer=timer_for(settings.device),
    )
    return {name: timing.median for name, timing in timings.items()}


def _place(head_dim: int, rows: int, settings: Settings) -> dict[str, Any]:
    """Seconds of forward with the mix in the tile loop, and with the mix before it."""
    point = Point("forward", "half", head_dim, "causal")
    call = _call(point, settings, length=rows)

    def forced(placement: str) -> object:
        with environment(MIX, placement):
            return call()

    return dict(_seconds({name: functools.partial(forced, name) for name in PLACES}, settings))


def load_table() -> space.Table:
    """The table that is committed."""
    table: space.Table = json.loads(configs().TABLE.read_text())
    return table

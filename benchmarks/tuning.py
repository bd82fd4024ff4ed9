"""`resformer-kernels tune`: try configurations of attention's Triton kernels on a GPU.

A configuration is compiled and held against the reference with others at a time, and then timed
alone. What time does not allow stays as it is in the table.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks import tuning_space as space
from benchmarks.device_jobs import TOLERANCE, Settings
from benchmarks.device_timer import timer_for
from benchmarks.supervisor import Job, Outcome
from benchmarks.tuning_space import Config, Point, Trial
from resformer_kernels import value_residual_attention
from resformer_kernels.bench.timing import Call, alternate, timed_call

TRY, TIME, PLACE = "tune try", "tune time", "tune place"
"""Kinds of job: compile and compare; time; time both placements of the mix."""

_TRY_SECONDS, _TIME_SECONDS, _PLACE_SECONDS = 90.0, 30.0, 60.0
_SAMPLE_SECONDS = 0.002
_TOKENS, _LENGTH, _WIDTH, _WINDOW = 16384, 4096, 2048, (1023, 0)
_TINY_TOKENS, _TINY_LENGTH, _TINY_WIDTH = 64, 32, 256
_MIX = "RESFORMER_MIX"


@dataclass
class Search:
    """What the trials said so far."""

    architecture: str
    table: space.Table
    failures: list[str] = field(default_factory=list)
    """Of the table's own configurations: those that fail are worse than slow."""
    tried: list[Trial] = field(default_factory=list)
    """Compiled, and right."""
    seconds: dict[Point, dict[Trial, float]] = field(default_factory=dict)
    placements: dict[int, dict[int, tuple[float, float]]] = field(default_factory=dict)
    """By head_dim and rows a KV head: seconds inline, and with a prologue."""
    unfinished: int = 0

    def add(self, outcome: Outcome) -> Job | None:
        """Take note of a job."""
        job = outcome.job
        if outcome.unfinished:
            self.unfinished += 1
        elif job.kind == PLACE:
            if outcome.result is not None:
                head_dim, rows = (int(number) for number in job.name.split())
                both = (outcome.result["inline"], outcome.result["prologue"])
                self.placements.setdefault(head_dim, {})[rows] = both
        else:
            self._add_trial(space.parse(job.name), outcome)
        return None

    def _add_trial(self, trial: Trial, outcome: Outcome) -> None:
        wrong = outcome.error if outcome.result is None else outcome.result["wrong"]
        if wrong:
            # Of the others, many are expected not to fit.
            if trial.config == space.current(self.table, self.architecture, trial.point):
                self.failures.append(f"{trial.name}: {wrong}")
        elif outcome.job.kind == TRY:
            self.tried.append(trial)
        else:
            assert outcome.result is not None
            self.seconds.setdefault(trial.point, {})[trial] = outcome.result["seconds"]

    def winners(self) -> dict[Point, Config]:
        """The configurations to put into the table, of the points whose own was timed."""
        found = {}
        for point, seconds in self.seconds.items():
            own = Trial(point, space.current(self.table, self.architecture, point))
            if own in seconds:
                chosen = space.best(seconds, own)
                if chosen != own:
                    found[point] = chosen.config
        return found

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
        Job(PLACE, f"{head_dim} {rows}", _PLACE_SECONDS)
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

    trials = [Job(TRY, trial.name, _TRY_SECONDS) for trial in space.in_turn(lists)]
    phase("compiled and compared", trials, workers, 0.6)
    good = [Job(TIME, trial.name, _TIME_SECONDS) for trial in search.tried]
    # The table's own first: without it nothing can be replaced.
    own = {trials[0].name for trials in lists}
    good.sort(key=lambda job: job.name not in own)
    phase("timed", good, 1, 0.9)
    phase("placements timed", place, 1, 1.0)


def run_job(job: Job, settings: Settings) -> dict[str, Any]:
    """Do one of this module's jobs, on the device."""
    if job.kind == PLACE:
        head_dim, rows = (int(number) for number in job.name.split())
        return _place(head_dim, rows, settings)
    trial = space.parse(job.name)
    with _configured(trial, architecture(settings.device)):
        if job.kind == TRY:
            return {"wrong": _compare(trial.point, settings)}
        return {"wrong": "", "seconds": _seconds({"": _call(trial.point, settings)}, settings)[""]}


def architecture(device: str) -> str:
    """The table's name for the device's kind; without a GPU, that which the interpreter plays."""
    kind = torch.device(device).type
    capability = torch.cuda.get_device_capability(device) if kind == "cuda" else (9, 0)
    name: str = configs().architecture(capability)
    return name


def configs() -> Any:
    """attention/triton/configs.py."""
    return importlib.import_module("resformer_kernels.attention.triton.configs")


@contextmanager
def _configured(trial: Trial, architecture: str) -> Iterator[None]:
    """Within it, the trial's configuration stands in the table of this process."""
    point = trial.point
    by_precision = configs().table()[architecture][point.direction]
    by_mask: dict[str, list[int]] = by_precision[point.precision][str(point.head_dim)]
    before = dict(by_mask)
    by_mask[point.mask] = list(trial.config)
    try:
        yield
    finally:
        by_mask.clear()
        by_mask.update(before)


@functools.lru_cache(maxsize=2)
def _leaves(
    head_dim: int, precision: str, length: int, device: str, tiny: bool
) -> tuple[list[Tensor], Tensor]:
    tokens, width = (_TINY_TOKENS, _TINY_WIDTH) if tiny else (_TOKENS, _WIDTH)
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if precision == "half" else torch.float32
    shape = (max(1, tokens // length), length, max(1, width // head_dim), head_dim)
    tensors = [torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(5)]
    lambdas = [torch.tensor(0.5, device=device) for _ in range(2)]
    return [*tensors[:4], *lambdas], tensors[4]


def _wanted(direction: str) -> tuple[int, ...]:
    """Which leaves a direction's kernel makes gradients of; none forward."""
    return {"forward": (), "keys": (1, 2, 3, 4, 5), "queries": (0,)}[direction]


def _call(
    point: Point, settings: Settings, *, backend: str = "triton", length: int | None = None
) -> Call:
    usual = _TINY_LENGTH if settings.tiny else _LENGTH
    leaves, grad = _leaves(
        point.head_dim, point.precision, length or usual, settings.device, settings.tiny
    )
    leaves = [leaf.detach() for leaf in leaves]
    options: dict[str, Any] = {"causal": point.mask == "causal", "backend": backend}
    if point.mask == "window":
        options["window"] = _WINDOW
    attend = functools.partial(value_residual_attention, *leaves, **options)
    wanted = [leaves[place] for place in _wanted(point.direction)]
    direction = "forward" if point.direction == "forward" else "backward"
    return timed_call(attend, wanted, direction, grad)


def _compare(point: Point, settings: Settings) -> str:
    """What is wrong with a configuration's results; "" where nothing is."""
    found, expected = _call(point, settings)(), _expected(point, settings)
    tensors = (found,) if isinstance(found, Tensor) else found
    assert isinstance(tensors, tuple)
    for place, (mine, true) in enumerate(zip(tensors, expected, strict=True)):
        # The gradients of scalars are cancelling sums: no measure of a kernel in one number.
        if mine.dim() == 0:
            continue
        distance = float((mine[:1].float() - true.float()).norm() / true.float().norm())
        if not distance <= TOLERANCE:
            return f"result {place} is off by {distance:.3f}"
    return ""


@functools.lru_cache(maxsize=2)
def _expected(point: Point, settings: Settings) -> tuple[Tensor, ...]:
    """The reference's results, of the first sequence."""
    length = _TINY_LENGTH if settings.tiny else _LENGTH
    every, grad = _leaves(point.head_dim, point.precision, length, settings.device, settings.tiny)
    leaves = [leaf[:1].detach() if leaf.dim() else leaf.detach() for leaf in every]
    window = _WINDOW if point.mask == "window" else (-1, -1)
    wanted = [leaves[place].requires_grad_() for place in _wanted(point.direction)]
    out = value_residual_attention(
        *leaves, causal=point.mask == "causal", window=window, backend="reference"
    )
    if not wanted:
        return (out.detach(),)
    return torch.autograd.grad(out, wanted, grad[:1])


def _seconds(calls: dict[str, Call], settings: Settings) -> dict[str, float]:
    timings = alternate(
        calls,
        samples=settings.samples,
        min_sample_s=_SAMPLE_SECONDS,
        timer=timer_for(settings.device),
    )
    return {name: statistics.median(timing.samples) for name, timing in timings.items()}


def _place(head_dim: int, rows: int, settings: Settings) -> dict[str, Any]:
    """Seconds of forward with the mix in its loop, and with the mix before it."""
    point = Point("forward", "half", head_dim, "causal")
    call = _call(point, settings, length=rows)

    def forced(placement: str) -> Call:
        def run_it() -> object:
            os.environ[_MIX] = placement
            return call()

        return run_it

    before = os.environ.get(_MIX)
    try:
        found = _seconds({name: forced(name) for name in ("inline", "prologue")}, settings)
    finally:
        if before is None:
            os.environ.pop(_MIX, None)
        else:
            os.environ[_MIX] = before
    return dict(found)


def load_table() -> space.Table:
    """The table that is committed."""
    table: space.Table = json.loads(configs().TABLE.read_text())
    return table

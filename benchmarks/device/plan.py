"""The phases of `device-check` and their jobs, in order; made without the device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import resformer_kernels
from benchmarks import registry, tuning
from benchmarks import tuning_space as space
from benchmarks.device import tools
from benchmarks.device.cases import CHECK, FAMILIES, LARGE, SMOKE, peer_cases, table
from benchmarks.device.common import Settings
from benchmarks.supervisor import Job
from benchmarks.workloads.device import FLEX, DeviceAttention
from resformer_kernels._triton import available

CEILINGS, PEERS, TIME, WARM = "ceilings", "peers", "time", "warm"
"""Kinds of job: yardsticks; timed beside peers; the same of every registered case; compiled
ahead of that."""

MOST_CONFIGS = 8
"""Configurations of a point that are tried."""

_SECONDS = {
    SMOKE: 25.0,
    CHECK: 90.0,
    LARGE: 60.0,
    CEILINGS: 60.0,
    PEERS: 60.0,
    TIME: 60.0,
    WARM: 150.0,
}
"""The most that a job of each kind may take."""
_TINY_SECONDS = 15.0
NATIVE = "native"


@dataclass(frozen=True)
class Phase:
    """Jobs that run together."""

    name: str
    jobs: Callable[[Sequence[str]], Sequence[Job]]
    """The jobs, given the names of the configurations that were tried and found right."""
    seconds: float
    """The most that it takes before the phases after it have had their turn."""
    at_once: int = 1
    """Processes that share the device; 0: as many as it and the cores take."""
    after_build: bool = False
    """Whether it waits for the CUDA library."""


def phases(
    settings: Settings,
    shortlist: Mapping[str, Sequence[Sequence[int]]],
    *,
    everything: bool = False,
) -> list[Phase]:
    """Every phase, most important first.

    Args:
        settings: the run's.
        shortlist: configurations to try, by point's name; other points have the nearest ones.
        everything: whether every registered case is timed at the end.
    """
    smoke, check, large = (comparisons(kind, settings) for kind in (SMOKE, CHECK, LARGE))
    ahead = [(own, others) for own, others in map(_by_library, (smoke, check))]
    tries = trials(settings, shortlist)
    sanitizers, profiles = tools.jobs()
    warm = _timed(WARM, peer_cases(settings.device, settings.tiny), settings)
    found = [
        Phase("smoke test", lambda _: ahead[0][1], 60),
        Phase("checks", lambda _: space.in_turn([ahead[1][1], warm]), 200, 0),
        Phase("native library", lambda _: [*ahead[0][0], *ahead[1][0]], 60, 0, after_build=True),
        Phase("large shapes", lambda _: large, 100, 3),
        Phase("peers", lambda _: [_ceilings(settings), *_peers(settings)], 120),
        Phase("sanitizer", lambda _: sanitizers, 90, 0),
        Phase("profiler", lambda _: profiles, 60),
        Phase("configurations tried", lambda _: _tune(tuning.TRY, tries, settings), 100, 0),
        Phase("configurations timed", lambda tried: _best(tries, tried, settings), 90),
    ]
    if everything:
        cases = registry.device_cases(settings.device, tiny=settings.tiny)
        compiled = [x for x in cases if not isinstance(x, DeviceAttention) or FLEX in x.peers]
        found += [
            Phase("compiled ahead", lambda _: _timed(WARM, compiled, settings), 3600, 0),
            Phase("every case timed", lambda _: _timed(TIME, cases, settings), 3600),
        ]
    return found


def comparisons(kind: str, settings: Settings) -> list[Job]:
    """Every case of a kind with each of its op's backends, attention first, reservoirs last."""
    order = list(FAMILIES)
    every = sorted(table(kind, "cpu", settings.tiny).items(), key=lambda x: order.index(x[1].op))
    return [
        _job(kind, f"{backend}: {name}", settings, f"{backend} {FAMILIES[check.op]}")
        for name, check in every
        for backend in backends(check.op)
    ]


def backends(op: str) -> list[str]:
    """The backends of an op that are not the reference."""
    api = importlib.import_module(getattr(resformer_kernels, op).__module__)
    return [module.NAME for module in api.BACKENDS if module.NAME != "reference"]


def trials(
    settings: Settings, shortlist: Mapping[str, Sequence[Sequence[int]]]
) -> list[space.Trial]:
    """Configurations to try, each point's own first; none where Triton cannot run."""
    if available.unavailable_reason(torch.device(settings.device)) is not None:
        return []
    wanted, most = points(settings.tiny), 2 if settings.tiny else MOST_CONFIGS
    content, name = tuning.load_table(), tuning.architecture(settings.device)
    lists = []
    for point in wanted:
        near = space.candidates(content, name, point)
        if point.name in shortlist:
            chosen = [(a, b, c, d) for a, b, c, d in shortlist[point.name]]
            near = [near[0], *(space.Trial(point, config) for config in chosen)]
        lists.append(list(dict.fromkeys(near))[:most])
    return space.in_turn(lists)


def points(tiny: bool = False) -> list[space.Point]:
    """The points of the tuning pass."""
    if tiny:
        return space.points((64,), ("forward",), ("causal",))
    return space.points((128, 64), masks=("causal", "full"))


def _by_library(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """(jobs of the native library, and all others)."""
    native = [job for job in jobs if job.name.startswith(f"{NATIVE}: ")]
    return native, [job for job in jobs if job not in native]


def _ceilings(settings: Settings) -> Job:
    return _job(CEILINGS, CEILINGS, settings, CEILINGS)


def _peers(settings: Settings) -> list[Job]:
    return _timed(PEERS, peer_cases(settings.device, settings.tiny), settings)


def _timed(kind: str, cases: Sequence[Any], settings: Settings) -> list[Job]:
    return [_job(kind, case.name, settings, f"triton {case.group.split()[0]}") for case in cases]


def _tune(kind: str, tries: Sequence[space.Trial], settings: Settings) -> list[Job]:
    seconds = 4 * _TINY_SECONDS if settings.tiny else 60.0
    return [
        Job(kind, trial.name, seconds, payload=trial, family=f"tune {trial.point.direction}")
        for trial in tries
    ]


def _best(tries: Sequence[space.Trial], tried: Sequence[str], settings: Settings) -> list[Job]:
    right = [trial for trial in tries if trial.name in set(tried)]
    return _tune(tuning.TIME, right, settings)


def _job(kind: str, name: str, settings: Settings, family: str) -> Job:
    seconds = min(_SECONDS[kind], _TINY_SECONDS) if settings.tiny else _SECONDS[kind]
    return Job(kind, name, seconds, family=family)

"""One call of `resformer-kernels device-check`: its phases, against the clock."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from benchmarks.device.build import Build
from benchmarks.device.common import Settings
from benchmarks.device.plan import Phase
from benchmarks.device.record import DeviceRun, key
from benchmarks.supervisor import Job, Outcome, Pool
from resformer_kernels.bench.machine import usable_cores

WORKER = ("-m", "benchmarks.device.worker")
"""The worker, as Python is told to run it."""

_ROOT = Path(__file__).resolve().parents[2]
_RESERVE_SECONDS = 3.0
_STORE_EVERY_SECONDS = 5.0
_MAX_WORKERS, _WORKER_BYTES = 12, 6 * 2**30

Progress = Callable[[DeviceRun, str, int, int], None]
"""progress(run, phase, jobs done, jobs in all)."""


@dataclass
class Call:
    """What one call is given. Times are of `time.monotonic()`."""

    settings: Settings
    phases: Sequence[Phase]
    path: Path
    """Where results are stored as they come."""
    progress: Progress
    workers: int = 0
    """Processes at once where a phase takes many; 0: as many as the device and the cores take."""
    build: Build | None = None
    """The CUDA library's, which runs beside the first phases."""
    worker: Sequence[str] = WORKER
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the workers, beside this process's."""
    begun: float = field(default_factory=time.monotonic)


def run(found: DeviceRun, call: Call, minutes: float) -> None:
    """Go on with `found` for `minutes`.

    Each phase has its time; what it did not reach is done after the others had their turn, or in
    the next call. Ctrl-C ends it early: results are stored, and KeyboardInterrupt is raised again.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    this = {"started": started, "minutes": minutes, "seconds": 0.0}
    found.calls.append(this)
    end = call.begun + 60 * minutes - min(_RESERVE_SECONDS, 6 * minutes)
    memory = int(found.machine.get("memory bytes", 0))
    workers = call.workers or worker_count(memory)
    plan(found, call.phases)
    try:
        with closing(pool(call.settings, workers, call.worker, call.environment)) as processes:
            for patient in (False, True):
                for phase in call.phases:
                    _run_phase(found, call, phase, processes, workers, end, patient=patient)
    finally:
        if call.build is not None:
            call.build.stop()
        this["seconds"] = round(time.monotonic() - call.begun, 1)
        found.store(call.path)


def plan(found: DeviceRun, phases: Sequence[Phase]) -> None:
    """Enter the jobs of every phase that are known by now."""
    names = [key(job) for phase in phases for job in phase.jobs(found.tried)]
    found.planned = list(dict.fromkeys(names))


def _run_phase(
    found: DeviceRun,
    call: Call,
    phase: Phase,
    processes: Pool,
    workers: int,
    end: float,
    *,
    patient: bool,
) -> None:
    """The jobs of a phase that are left, none of them begun after the phase's time unless
    `patient`."""
    begun = time.monotonic()
    limit = end if patient else begun + phase.seconds - found.seconds.get(phase.name, 0.0)
    plan(found, call.phases)
    jobs = [job for job in phase.jobs(found.tried) if found.is_open(job)]
    if not jobs or begun >= min(limit, end):
        return
    if phase.after_build and call.build is not None:
        found.built(*call.build.finish(min(limit, end)))
        call.build = None
        # Processes that have looked for the library do not look again.
        processes.close()
    done, stored = 0, time.monotonic()
    starts: dict[str, float] = {}

    def ready(job: Job) -> Job | None:
        nonlocal done
        if time.monotonic() >= limit:
            return None
        following = found.ready(job)
        done += following is None
        starts[key(job)] = time.monotonic()
        return following

    def take(outcome: Outcome) -> Job | None:
        nonlocal done, stored
        now = time.monotonic()
        following = found.add(outcome, now - starts[key(outcome.job)])
        done += following is None and not outcome.unfinished
        call.progress(found, phase.name, done, len(jobs))
        if now - stored > _STORE_EVERY_SECONDS:
            found.store(call.path)
            stored = now
        return following

    call.progress(found, phase.name, 0, len(jobs))
    at_once = workers if phase.at_once == 0 else min(workers, phase.at_once)
    processes.do(jobs, workers=at_once, until=end, on_outcome=take, ready=ready)
    spent = found.seconds.get(phase.name, 0.0) + time.monotonic() - begun
    found.seconds[phase.name] = round(spent, 1)
    found.store(call.path)


def worker_count(memory: int) -> int:
    """How many processes may share a device of `memory` bytes (0: unknown), and the cores."""
    by_memory = memory // _WORKER_BYTES if memory else _MAX_WORKERS
    return max(1, min(_MAX_WORKERS, usable_cores() - 2, by_memory))


def pool(
    settings: Settings,
    workers: int,
    worker: Sequence[str] = WORKER,
    extra: Mapping[str, str] | None = None,
) -> Pool:
    """Processes for the jobs of a device. They find this checkout, and leave the cores to one
    another."""
    environment = {**os.environ, **(extra or {})}
    paths = [str(_ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if workers > 1:
        environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return Pool((sys.executable, *worker, json.dumps(asdict(settings))), environment)


def on_workers(
    settings: Settings,
    jobs: Sequence[Job],
    at_once: int,
    until: float,
    on_outcome: Callable[[Outcome], Job | None],
) -> None:
    """Do `jobs` with `at_once` processes that end with them."""
    with closing(pool(settings, at_once)) as processes:
        processes.do(jobs, workers=at_once, until=until, on_outcome=on_outcome)

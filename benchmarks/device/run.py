"""One run of `resformer-kernels device-check`: its phases, results and JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import device_jobs
from benchmarks.device_build import Build
from benchmarks.device_jobs import Settings
from benchmarks.supervisor import Job, Outcome, supervise, without
from benchmarks.tuning_space import in_turn
from resformer_kernels.bench.machine import usable_cores
from resformer_kernels.bench.timing import OURS

FORMAT = 1
"""Version of the stored JSON."""

_ROOT = Path(__file__).resolve().parent.parent
_CHECK_SHARE, _NATIVE_SHARE = 0.42, 0.47
"""Shares of the time after which comparisons end, and those of the library built meanwhile."""
_RESERVE_SECONDS = 3.0
_STORE_EVERY_SECONDS = 5.0
_MAX_WORKERS, _WORKER_BYTES = 12, 6 * 2**30
_NATIVE = "checks of the native library"
_TOGETHER = ("checks and compilation", _NATIVE)
"""Phases whose jobs share the device."""


@dataclass
class DeviceRun:
    """Results so far."""

    settings: Settings
    budget_s: float
    started: str
    ceilings: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    """Comparisons with float64: job, op, backend and verdicts."""
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    """Reasons of backends that refused a case, by op and backend."""
    timings: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    """Faults of this package: job, part and reason."""
    missing: dict[str, str] = field(default_factory=dict)
    """Peers that could not be measured, by case and name."""
    unfinished: list[str] = field(default_factory=list)
    """Jobs that there was no time for."""
    cuda_library: str = "not built: not asked for"
    """The outcome of the CUDA library's build."""

    def add(self, outcome: Outcome) -> Job | None:
        """Take note; returns the job to do next, without the part that broke this one."""
        job = outcome.job
        if outcome.unfinished:
            if job.kind != "warm":
                self.unfinished.append(f"{job.kind} {job.name}")
            return None
        if outcome.result is None:
            return self._broke(outcome)
        if job.kind == "ceilings":
            self.ceilings = outcome.result
        elif job.kind == "check":
            self._add_check(job, outcome.result)
        elif job.kind == "time":
            self._add_timing(job, outcome.result)
        return None

    def _fail(self, job: Job, part: str, reason: str) -> None:
        self.failures.append({"job": f"{job.kind} {job.name}", "part": part, "reason": reason})

    def _note(self, job: Job, part: str, reason: str, *, failed: bool) -> None:
        if failed:
            self._fail(job, part, reason)
        else:
            self.missing[f"{job.name}: {part}"] = reason

    def _broke(self, outcome: Outcome) -> Job | None:
        job, part = outcome.job, outcome.at
        again = without(job, part) if part and job.kind in ("warm", "time") else None
        # A part that fails while it is only compiled ahead fails again where it counts.
        if job.kind == "warm":
            return again
        self._note(job, part, outcome.error, failed=again is None or part == OURS)
        return again

    def _add_check(self, job: Job, result: dict[str, Any]) -> None:
        if "refused" in result:
            self.refused.setdefault(result["op"], {})[result["backend"]] = result["refused"]
            return
        self.checks.append({"job": job.name, **result})
        over = [v for v in result["verdicts"] if not v["ok"]]
        if over:
            told = ", ".join(
                f"{v['tensor']} {v['error']:.2e} over its budget of {v['budget']:.2e}" for v in over
            )
            self._fail(job, "", told)

    def _add_timing(self, job: Job, result: dict[str, Any]) -> None:
        for part, reason in (result["errors"] | result["missing"]).items():
            self._note(job, part, reason, failed=part == OURS and part in result["errors"])
        if result["wrong"]:
            told = ", ".join(f"{name} {off:.3f}" for name, off in result["wrong"].items())
            self._fail(job, OURS, f"relative distance from SDPA: {told}")
        if "timings" in result:
            self.timings.append(result)

    def built(self, outcome: str, failed: bool) -> None:
        """Take note of the build of the CUDA library."""
        self.cuda_library = outcome
        if failed:
            self.failures.append({"job": "build", "part": "CUDA library", "reason": outcome})

    def absent(self) -> dict[str, dict[str, str]]:
        """By op: the backends that served no case, with a reason."""
        served = {(check["op"], check["backend"]) for check in self.checks}
        return {
            op: {name: why for name, why in reasons.items() if (op, name) not in served}
            for op, reasons in self.refused.items()
        }

    def as_json(self) -> dict[str, Any]:
        """The content of this device's file."""
        return {
            "format": FORMAT,
            "kind": "device",
            "started": self.started,
            "budget_s": self.budget_s,
            **self.ceilings,
            "failures": self.failures,
            "unfinished": self.unfinished,
            "cuda_library": self.cuda_library,
            "absent_backends": self.absent(),
            "missing_peers": self.missing,
            "timings": self.timings,
            "checks": self.checks,
        }

    def store(self, path: Path) -> None:
        """Write the JSON atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.as_json(), indent=1, default=str) + "\n")
        part.replace(path)


Progress = Callable[[DeviceRun, str, int, int], None]
"""progress(run, phase, jobs done, jobs in all)."""


def run(
    settings: Settings,
    budget_s: float,
    path: Callable[[DeviceRun], Path],
    progress: Progress,
    workers: int | None = None,
    build: Build | None = None,
) -> DeviceRun:
    """Every phase, within `budget_s` seconds; results are stored at `path(run)` as they come.

    `build` runs beside the first phases; the native library is checked after it. Ctrl-C ends the
    run early: results up to then are stored, and KeyboardInterrupt is raised again.
    """
    begun = time.monotonic()
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = DeviceRun(settings, budget_s, started)
    end = begun + budget_s - min(_RESERVE_SECONDS, budget_s / 10)
    native, others = device_jobs.check_jobs(settings)
    # In turn, so that a short run has both kinds.
    together = in_turn([others, device_jobs.warm_jobs(settings)])
    phases = (
        ("ceilings", [device_jobs.ceilings_job()], end),
        ("checks and compilation", together, begun + _CHECK_SHARE * budget_s),
        (_NATIVE, native, begun + _NATIVE_SHARE * budget_s),
        ("timings", device_jobs.time_jobs(settings), end),
    )
    stored = time.monotonic()

    try:
        for phase, jobs, until in phases:
            done = 0
            if phase == _NATIVE and build is not None:
                found.built(*build.finish(begun + _CHECK_SHARE * budget_s))
            memory = int(found.ceilings.get("machine", {}).get("memory bytes", 0))
            at_once = (workers or worker_count(memory)) if phase in _TOGETHER else 1

            def take(outcome: Outcome, phase: str = phase, total: int = len(jobs)) -> Job | None:
                nonlocal done, stored
                following = found.add(outcome)
                done += following is None
                progress(found, phase, done, total)
                if time.monotonic() - stored > _STORE_EVERY_SECONDS:
                    found.store(path(found))
                    stored = time.monotonic()
                return following

            on_workers(settings, jobs, at_once, until, take)
    finally:
        if build is not None:
            build.stop()
        found.store(path(found))
    return found


def worker_count(memory: int) -> int:
    """How many processes may share a device of `memory` bytes (0: unknown), and the cores."""
    by_memory = memory // _WORKER_BYTES if memory else _MAX_WORKERS
    return max(1, min(_MAX_WORKERS, usable_cores() - 2, by_memory))


def on_workers(
    settings: Settings,
    jobs: Sequence[Job],
    at_once: int,
    until: float,
    on_outcome: Callable[[Outcome], Job | None],
) -> None:
    """`supervise` the jobs of a device, `at_once` workers sharing it.

    A worker finds this checkout, and leaves the cores to the others.
    """
    environment = dict(os.environ)
    paths = [str(_ROOT), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    if at_once > 1:
        environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = (sys.executable, "-m", "benchmarks.device_worker", json.dumps(asdict(settings)))
    supervise(
        jobs,
        command,
        workers=at_once,
        until=until,
        on_outcome=on_outcome,
        environment=environment,
    )

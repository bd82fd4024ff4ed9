"""What `device-check` has found so far, as JSON that a later call goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from benchmarks import tuning
from benchmarks import tuning_space as space
from benchmarks.device import tools
from benchmarks.device.cases import CHECK, LARGE, SMOKE
from benchmarks.device.common import Settings
from benchmarks.device.plan import CEILINGS, PEERS, TIME, WARM
from benchmarks.supervisor import Job, Outcome, without
from resformer_kernels.bench import machine
from resformer_kernels.bench.timing import OURS

FORMAT = 2
"""Version of the stored JSON."""
CRASHES = 2
"""Crashes or hangs after which a family of kernels is left out."""

_ROOT = Path(__file__).resolve().parents[2]
_SOURCES = ("resformer_kernels", "csrc", "benchmarks")
_SUFFIXES = (".py", ".json", ".cpp", ".cu", ".h")
_NOT_SOURCES = ("results",)


class Mismatch(ValueError):
    """A stored run that this one cannot go on from."""


def fingerprint(settings: Settings) -> dict[str, Any]:
    """What two calls have to share for the second to go on from the first."""
    about = machine.describe_device(settings.device)
    names = ("device", "torch", "triton", "cuda", "python")
    found: dict[str, Any] = {name: str(about[name]) for name in names if name in about}
    return {**found, "sources": sources_digest(), "settings": asdict(settings)}


def sources_digest() -> str:
    """Of the sources: a copy of the checkout need not have its history."""
    digest = hashlib.sha256()
    for path in sorted(path for name in _SOURCES for path in (_ROOT / name).rglob("*")):
        if path.suffix in _SUFFIXES and not set(path.parts) & set(_NOT_SOURCES):
            digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@dataclass
class DeviceRun:
    """Results so far, of every call that went on from another."""

    fingerprint: dict[str, Any]
    machine: dict[str, Any]
    architecture: str
    """The name of its table of configurations."""
    calls: list[dict[str, Any]] = field(default_factory=list)
    """When each call began, its minutes, and the seconds that it took."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Spent in each phase."""
    done: dict[str, float] = field(default_factory=dict)
    """Jobs that need not run again, with their seconds."""
    planned: list[str] = field(default_factory=list)
    """Jobs known so far."""
    ceilings: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    """Comparisons with float64: job, op, backend, verdicts, and runs whose bits were compared."""
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    """Reasons of backends that refused a case, by op and backend."""
    timings: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    """Faults of this package: job, part and reason."""
    missing: dict[str, str] = field(default_factory=dict)
    """Peers that could not be measured, by case and name."""
    crashes: dict[str, list[str]] = field(default_factory=dict)
    """Jobs that took their process down or did not end, by family."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Jobs not begun since their family had crashed too often, by name, with the family."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """What the sanitizer and the profiler found."""
    shortlist: dict[str, list[list[int]]] = field(default_factory=dict)
    """Configurations to try that compile without spills, by point's name."""
    tried: list[str] = field(default_factory=list)
    """Configurations that compile and are right."""
    tuned: dict[str, float] = field(default_factory=dict)
    """Seconds of configurations."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Configurations that do not compile, do not end or are not right."""
    triton: dict[str, int] = field(default_factory=dict)
    """Kernels that Triton compiled here, and those found in its cache."""
    notes: dict[str, str] = field(default_factory=dict)
    """What became of the CUDA library, the bundle and the tools."""

    @property
    def unfinished(self) -> list[str]:
        """Jobs that there was no time for yet, but for those that only compile ahead."""
        ahead = f"{WARM} "
        closed = self.done.keys() | self.left_out.keys()
        return [x for x in self.planned if x not in closed and not x.startswith(ahead)]

    def is_open(self, job: Job) -> bool:
        """Whether a job has still to run."""
        timed = {f"{kind} {job.name}" for kind in (PEERS, TIME)} if job.kind == WARM else set()
        return not ({key(job), *timed} & (self.done.keys() | self.left_out.keys()))

    def ready(self, job: Job) -> Job | None:
        """The job without the peers that crashed too often; None where it need not run."""
        if not self.is_open(job):
            return None
        if self.is_out(job.family):
            self.left_out[key(job)] = job.family
            return None
        peers = [family for family in self.crashes if self.is_out(family)]
        if job.kind in (PEERS, TIME, WARM) and set(peers) - set(job.without):
            return replace(job, without=tuple(dict.fromkeys((*job.without, *peers))))
        return job

    def is_out(self, family: str) -> bool:
        """Whether a family of kernels, or a peer, crashed too often."""
        return len(self.crashes.get(family, ())) >= CRASHES

    def add(self, outcome: Outcome, seconds: float = 0.0) -> Job | None:
        """Take note; returns the job to do next, without the part that broke this one."""
        job = outcome.job
        if outcome.unfinished:
            return None
        if outcome.result is None:
            following = self._broke(outcome)
            if following is not None:
                return following
        else:
            for name, count in outcome.result.pop("triton", {}).items():
                self.triton[name] = self.triton.get(name, 0) + count
            self._take(job, outcome.result)
        self.done[key(job)] = round(seconds, 2)
        return None

    def _take(self, job: Job, result: dict[str, Any]) -> None:
        if job.kind == CEILINGS:
            self.ceilings = result
        elif job.kind in (SMOKE, CHECK, LARGE):
            self._add_check(job, result)
        elif job.kind in (PEERS, TIME):
            self._add_timing(job, result)
        elif job.kind in (tools.SANITIZE, tools.PROFILE):
            self.tools.append({"job": key(job), **result})
            if result["found"]:
                self._fail(job, result["tool"], result["said"][-600:])
        elif job.kind in (tuning.TRY, tuning.TIME):
            self._add_trial(job, result)

    def _add_trial(self, job: Job, result: dict[str, Any]) -> None:
        if result["wrong"]:
            self._reject(job, result["wrong"])
        elif job.kind == tuning.TRY:
            self.tried.append(job.name)
        else:
            self.tuned[job.name] = result["seconds"]

    def _reject(self, job: Job, reason: str) -> None:
        self.rejected[job.name] = reason
        point = job.payload.point
        # Many others are expected not to fit.
        if job.payload.config == space.current(tuning.load_table(), self.architecture, point):
            self._fail(job, "", reason)

    def _fail(self, job: Job, part: str, reason: str) -> None:
        self.failures.append({"job": key(job), "part": part, "reason": reason})

    def _note(self, job: Job, part: str, reason: str, *, failed: bool) -> None:
        if failed:
            self._fail(job, part, reason)
        else:
            self.missing[f"{job.name}: {part}"] = reason

    def _broke(self, outcome: Outcome) -> Job | None:
        job, part = outcome.job, outcome.at
        if outcome.lost or outcome.fatal:
            family = job.family if part in ("", OURS) else part
            self.crashes.setdefault(family, []).append(f"{key(job)}: {outcome.error}"[:300])
        again = without(job, part) if part and job.kind in (WARM, PEERS, TIME) else None
        # A part that fails while it is only compiled ahead fails again where it counts.
        if job.kind == WARM:
            return again
        if job.kind in (tuning.TRY, tuning.TIME):
            self._reject(job, outcome.error)
            return None
        if job.kind in (tools.SANITIZE, tools.PROFILE):
            self.tools.append({"job": key(job), "said": outcome.error, "found": False})
            return None
        self._note(job, part, outcome.error, failed=again is None or part == OURS)
        return again

    def _add_check(self, job: Job, result: dict[str, Any]) -> None:
        if "refused" in result:
            self.refused.setdefault(result["op"], {})[result["backend"]] = result["refused"]
            return
        self.checks.append({"job": key(job), "kind": job.kind, **result})
        over = [v for v in result["verdicts"] if not v["ok"]]
        if over:
            told = ", ".join(
                f"{v['tensor']} {v['error']:.2e} over its budget of {v['budget']:.2e}" for v in over
            )
            self._fail(job, "", told)
        if result["differing"]:
            self._fail(job, "repeated", result["differing"])

    def _add_timing(self, job: Job, result: dict[str, Any]) -> None:
        for part, reason in (result["errors"] | result["missing"]).items():
            self._note(job, part, reason, failed=part == OURS and part in result["errors"])
        if result["wrong"]:
            told = ", ".join(f"{name} {off:.3f}" for name, off in result["wrong"].items())
            self._fail(job, OURS, f"relative distance from SDPA: {told}")
        if "timings" in result:
            self.timings.append({"kind": job.kind, **result})

    def built(self, outcome: str, failed: bool) -> None:
        """Take note of the build of the CUDA library."""
        self.notes["CUDA library"] = outcome
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
        """The content of this run's file."""
        return {
            "format": FORMAT,
            "kind": "device",
            "unfinished": self.unfinished,
            "absent_backends": self.absent(),
            **asdict(self),
        }

    def store(self, path: Path) -> None:
        """Write the JSON atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.as_json(), indent=1, default=str) + "\n")
        part.replace(path)


def fresh(settings: Settings) -> DeviceRun:
    """A run of this device that has found nothing yet."""
    about = machine.describe_device(settings.device)
    return DeviceRun(fingerprint(settings), about, tuning.architecture(settings.device))


def slug(settings: Settings) -> str:
    """A file name's stem for the device."""
    return machine.device_slug(settings.device)


def stored(path: Path, expected: Mapping[str, Any]) -> DeviceRun:
    """The run that is stored at `path`.

    Raises `Mismatch` where it is none, or one of another device, of other versions, sources or
    settings than those of `expected`, a `fingerprint`.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Mismatch(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict) or (content.get("kind"), content.get("format")) != (
        "device",
        FORMAT,
    ):
        raise Mismatch(f"{path} is no run of device-check in format {FORMAT}")
    before = content["fingerprint"]
    other = [name for name in expected if before.get(name) != expected[name]]
    if other:
        told = ", ".join(f"{name} {before.get(name)}, here {expected[name]}" for name in other)
        raise Mismatch(f"{path} is of another run: {told}")
    known = {each.name for each in fields(DeviceRun)}
    return DeviceRun(**{name: value for name, value in content.items() if name in known})


def key(job: Job) -> str:
    """The job's name in `done` and `planned`."""
    return f"{job.kind} {job.name}"

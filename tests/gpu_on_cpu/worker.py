"""Cases run in a process of their own: tests run with TRITON_INTERPRET, which compiles nothing.

The process reads a list of jobs and writes a line for each verdict as it comes, all as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tests.gpu_on_cpu.executor import POLICIES, WHEN, Fault, Schedule

if TYPE_CHECKING:
    from tests.gpu_on_cpu.cases import Case

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Job:
    """A case for one architecture, under one schedule."""

    case: str
    """Full name of one of `cases`."""
    capability: int
    policy: str = "round_robin"
    when: str = "early"
    seed: int = 0
    edit: str = ""
    """Function that changes the PTX of every kernel, as "module:function"."""

    def __str__(self) -> str:
        order = f"{self.policy}, {self.when}, seed {self.seed}"
        return f"{self.case}, sm_{self.capability}, {order}" + f", {self.edit}" * bool(self.edit)


def jobs_of(
    capabilities: Iterable[int],
    seeds: int,
    wanted: Callable[[Case], bool],
    *,
    policy: str | None = None,
    when: str | None = None,
    edit: str = "",
) -> Iterator[Job]:
    """Every case that is `wanted`, for every architecture, under so many schedules: together they
    take all policies and moments in turn, where none is given."""
    from tests.gpu_on_cpu.cases import all_cases

    cases = [name for name, case in all_cases().items() if wanted(case)]
    for number, (name, capability) in enumerate(itertools.product(cases, capabilities)):
        for seed in range(number, number + seeds):
            yield Job(
                name,
                capability,
                policy or POLICIES[seed % len(POLICIES)],
                when or WHEN[seed % len(WHEN)],
                seed,
                edit,
            )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a job."""

    job: Job
    kind: str
    """"" where all is well; the kind of a fault; "value" for results that are wrong; "error"."""
    text: str
    """Why it failed."""
    seconds: float
    """All of it, the reference too."""
    launched: float
    """Seconds of launches: to compile, to parse, and to run."""
    kernels: dict[str, int]
    """Launches by kernel."""
    executed: dict[str, int]
    """Instructions of warps by opcode, in all launches that ended well."""

    @property
    def steps(self) -> int:
        """Instructions of warps."""
        return sum(self.executed.values())


def verdicts(jobs: Iterable[Job]) -> Iterator[Verdict]:
    """Run jobs in one new process, in order.

    Raises:
        RuntimeError: the process died; with what it wrote to standard error.
    """
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "tests.gpu_on_cpu.worker"]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with process.stdin as given:
            json.dump([dataclasses.asdict(job) for job in jobs], given)
        for line in process.stdout:
            found = json.loads(line)
            yield Verdict(job=Job(**found.pop("job")), **found)
        if process.wait() != 0:
            raise RuntimeError(f"a worker died, exit status {process.returncode}")
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def judged(job: Job) -> Verdict:
    """Run a job in this process."""
    from tests.gpu_on_cpu.cases import all_cases
    from tests.gpu_on_cpu.emulation import emulated

    case = all_cases()[job.case]
    start, kind, text = time.perf_counter(), "", ""
    schedule = Schedule(job.policy, job.when, job.seed)
    with (
        mock.patch.dict(os.environ, case.environment),
        emulated(
            *(job.capability, schedule, _edit(job.edit)), multiprocessors=case.multiprocessors
        ) as emulation,
    ):
        try:
            case.check()
        except Fault as fault:
            kind, text = fault.kind, str(fault)
        except AssertionError as error:
            kind, text = "value", str(error)
        except Exception as error:  # noqa: BLE001 - the verdict on this job, others go on
            kind, text = "error", f"{type(error).__name__}: {error}"
    executed: Counter[str] = Counter()
    for done in emulation.executed:
        executed.update(done.report.executed)
    kernels = Counter(done.kernel for done in emulation.executed)
    seconds = time.perf_counter() - start
    launched = sum(done.seconds for done in emulation.executed)
    return Verdict(job, kind, text, seconds, launched, dict(kernels), dict(executed))


def _edit(name: str) -> Callable[[str], str] | None:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function) if module else None


def main() -> None:
    """Judge the jobs of standard input."""
    assert "TRITON_INTERPRET" not in os.environ
    output = sys.stdout
    jobs = [Job(**job) for job in json.load(sys.stdin)]
    # What kernels and compilers print is no verdict.
    with contextlib.redirect_stdout(sys.stderr):
        for job in jobs:
            output.write(json.dumps(dataclasses.asdict(judged(job))) + "\n")
            output.flush()


if __name__ == "__main__":
    main()

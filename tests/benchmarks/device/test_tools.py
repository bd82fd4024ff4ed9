"""NVIDIA's checkers and profiler, as programs of their names that run what they are given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.device import tools
from benchmarks.device.common import Settings
from benchmarks.device.record import DeviceRun
from benchmarks.supervisor import Job, Outcome

# Both drop their own options, run the rest and fail where that fails.
SANITIZER = """#!/bin/sh
while case "$1" in --*) true;; *) false;; esac; do shift; done
"$@" || exit 1
case "$CHECKED" in race) echo "ERROR: Race reported between Write access"; exit 86;; esac
echo "========= ERROR SUMMARY: 0 errors"
"""
PROFILER = """#!/bin/sh
while case "$1" in --*) true;; *) false;; esac; do shift; done
"$@" || exit 1
echo '==PROF== Connected'
echo '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"'
echo '"","","us","register/thread"'
echo '"0","forward_kernel","410.25","168"'
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]), prepend=os.pathsep)
    return tmp_path


def put(folder: Path, name: str, program: str) -> None:
    (folder / name).write_text(program)
    (folder / name).chmod(0o755)


def test_tools_that_are_not_here_make_no_jobs_and_are_named() -> None:
    assert tools.jobs() == ([], [])
    assert [line.split()[0] for line in tools.absent()] == ["compute-sanitizer", "ncu"]


def test_the_sanitizer_runs_a_tiny_case_under_each_checker(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, tools.SANITIZER, SANITIZER)
    jobs, profiles = tools.jobs()
    assert profiles == []
    assert {job.name.split(":")[0] for job in jobs} == {"racecheck", "memcheck", "synccheck"}
    ops = {job.name.split(": ")[1].split(",")[0] for job in jobs}
    assert ops == {"linear_scan", "attention_with_kvcache", "reservoir_scan"}
    scan = next(job for job in jobs if "linear_scan" in job.name)
    found = tools.run(scan, Settings("cpu"))
    assert (found["code"], found["found"]) == (0, False), found["said"]
    monkeypatch.setenv("CHECKED", "race")
    found = tools.run(scan, Settings("cpu"))
    assert found["found"]
    run = DeviceRun({}, {}, "sm90")
    run.add(Outcome(scan, found))
    assert "Race reported" in run.failures[0]["reason"]


def test_the_profiler_reads_four_kernels(folder: Path) -> None:
    put(folder, tools.PROFILER, PROFILER)
    checked, jobs = tools.jobs()
    assert checked == []
    assert len(jobs) == 4
    # The case of a profile is too large for an interpreter.
    small = Job(jobs[0].kind, jobs[0].name.partition(": ")[0] + ": none", 1.0)
    found = tools.run(small, Settings("cpu", tiny=True))
    assert (found["code"], found["found"], found["kernels"]) == (1, False, [])
    assert "KeyError" in found["said"]


def test_what_the_profiler_printed_is_read() -> None:
    lines = [line for line in PROFILER.splitlines() if line.startswith("echo")]
    output = "\n".join(line.removeprefix("echo ").strip("'") for line in lines)
    assert tools.profiled(output) == [
        {"kernel": "forward_kernel", "time": "410.25 us", "registers": "168 register/thread"}
    ]
    assert tools.profiled("==WARNING== No kernels were profiled.") == []

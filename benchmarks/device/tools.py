"""NVIDIA's checkers and profiler on a few kernels, where the machine has them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.device.cases import FAMILIES, LARGE, SMOKE, table
from benchmarks.device.common import Settings
from benchmarks.supervisor import Job

SANITIZE, PROFILE = "sanitize", "profile"
"""Kinds of job."""

SANITIZER, PROFILER = "compute-sanitizer", "ncu"
_CHECKERS = ("racecheck", "memcheck", "synccheck")
_SANITIZED = ("scan", "decode", "reservoir")
"""Families whose kernels order memory between threads or programs themselves."""
_PROFILED = (
    ("attention", "forward_kernel"),
    ("attention", "keys_gradient_kernel"),
    ("scan", "forward_kernel"),
    ("decode", "attend_kernel"),
)
"""Family and kernel."""
_SECONDS = 80.0
_METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_shared_mem": "blocks by shared memory",
}
_FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute")
_ERROR_CODE = 86
"""The sanitizer's exit code where it found something."""
_TAIL = 3000


def found(tool: str) -> str | None:
    """The path of a tool: on PATH, or where CUDA's installers put it."""
    on_path = shutil.which(tool)
    if on_path is not None:
        return on_path
    homes = [*_FOLDERS, f"{os.environ.get('CUDA_HOME', _FOLDERS[0])}/bin"]
    at = [path for home in homes for path in (Path(home) / tool, *Path(home).glob(f"*/{tool}"))]
    return next((str(path) for path in at if os.access(path, os.X_OK)), None)


def absent() -> list[str]:
    """The tools that this machine lacks, each in a sentence."""
    tools = (SANITIZER, PROFILER)
    return [f"{name} is not on this machine: skipped" for name in tools if found(name) is None]


def jobs() -> tuple[list[Job], list[Job]]:
    """The sanitizer's jobs and the profiler's, of the tools that are here."""
    checked = [
        Job(SANITIZE, f"{checker}: {name}", _SECONDS, family=SANITIZER)
        for checker in _CHECKERS
        for name in _names(SMOKE, _SANITIZED)
    ]
    profiled = [
        Job(PROFILE, f"{kernel}: {_names(LARGE, (family,))[0]}", _SECONDS, family=PROFILER)
        for family, kernel in _PROFILED
    ]
    return (checked if found(SANITIZER) else []), (profiled if found(PROFILER) else [])


def _names(kind: str, families: tuple[str, ...]) -> list[str]:
    # The sanitizer is slow: tiny cases.
    every = table(kind, "cpu", kind == SMOKE)
    return [name for name, check in every.items() if FAMILIES[check.op] in families]


def run(job: Job, settings: Settings) -> dict[str, Any]:
    """Run a tool on one case's kernels: what it said, and whether it found something."""
    which, _, name = job.name.partition(": ")
    if job.kind == SANITIZE:
        tool, kind = SANITIZER, SMOKE
        settings = replace(settings, tiny=True)
        options = [f"--tool={which}", f"--error-exitcode={_ERROR_CODE}", "--print-limit=20"]
    else:
        tool, kind = PROFILER, LARGE
        options = ["--clock-control=none", "--csv", "--page=raw", "--launch-count=1"]
        options += [f"--metrics={','.join(_METRICS)}"]
        options += [f"--kernel-name={which}"]
    path = found(tool)
    assert path is not None
    program = [sys.executable, "-m", "benchmarks.device.once"]
    command = [path, *options, *program, json.dumps(asdict(settings)), kind, name]
    environment = dict(os.environ)
    if tool == SANITIZER:
        # Memory of its own for each tensor, so that what lies past its end is nobody's.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    said = f"{done.stdout}\n{done.stderr}".strip()
    result: dict[str, Any] = {"tool": which if tool == SANITIZER else tool, "case": name}
    result |= {"code": done.returncode, "found": done.returncode == _ERROR_CODE}
    if tool == PROFILER:
        result["kernels"] = profiled(done.stdout)
    return {**result, "said": said[-_TAIL:]}


def profiled(output: str) -> list[dict[str, str]]:
    """The kernels in ncu's CSV, with `_METRICS` by their short names and units."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    if len(lines) < 2:
        return []
    heading, units, *rows = csv.reader(lines)
    kernels = []
    for row in rows:
        named, in_unit = (
            dict(zip(heading, row, strict=False)),
            dict(zip(heading, units, strict=False)),
        )
        metrics = {
            short: f"{named[name]} {in_unit.get(name, '')}".strip()
            for name, short in _METRICS.items()
            if name in named
        }
        kernels.append({"kernel": named.get("Kernel Name", "?"), **metrics})
    return kernels

"""A run as a file, and back.

The file is one of pytest-benchmark's, whose statistics are its own, so that `pytest-benchmark
compare` reads it too; what that format has no place for stands beside.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest_benchmark
from pytest_benchmark.stats import Stats

from benchmarks.runner import MemoryPoint, Run
from resformer_kernels.bench.timing import Result, Timing
from resformer_kernels.testing.verification import Verdict

FORMAT = 2
RESULTS = Path(__file__).parent / "results"
"""The runs that README.md and docs/ quote."""


class UnreadableError(ValueError):
    """A file that holds no run; the message names it."""


def store(run: Run, path: Path) -> Path:
    """Write the run; the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(run), indent=1, default=str) + "\n")
    return path


def load(path: Path) -> Run:
    """The run in a file. `UnreadableError` where there is none."""
    try:
        data = json.loads(path.read_text())
        return from_json(data)
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableError(f"{path} holds no stored run: {error!r}") from error


def as_json(run: Run) -> dict[str, Any]:
    """For `store`."""
    return {
        "format": FORMAT,
        "version": pytest_benchmark.__version__,
        "datetime": run.started,
        "machine_info": run.machine,
        "commit_info": {"id": run.machine.get("commit", "unknown")},
        "benchmarks": [
            _benchmark(result, name) for result in run.results for name in result.timings
        ],
        "machine": run.machine,
        "started": run.started,
        "gemm_flops_per_s": run.gemm,
        "bandwidth_bytes_per_s": run.bandwidth,
        "freed_memory_kept": run.freed_memory_kept,
        "timings": [_summary(result) for result in run.results],
        "left_out": run.left_out,
        "window_pair_shares": run.window_shares,
        "peak_memory": [asdict(point) for point in run.memory],
        "errors": [asdict(verdict) for verdict in run.errors],
    }


def _benchmark(result: Result, contestant: str) -> dict[str, Any]:
    stats: Any = Stats()
    for sample in result.timings[contestant].samples:
        stats.update(sample)
    name = f"{result.name} [{contestant}]"
    return {
        "group": result.name,
        "name": name,
        "fullname": name,
        "params": None,
        "param": None,
        "extra_info": {
            "case": result.name,
            "contestant": contestant,
            "fresh_pages": list(result.timings[contestant].fresh_pages),
        },
        "options": {"disable_gc": True, "timer": "perf_counter", "warmup": True},
        "stats": {**stats.as_dict(), "iterations": 1, "data": stats.data},
    }


def _summary(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "group": result.group,
        "dtype": result.dtype,
        "flops": result.flops,
        "bytes": result.bytes,
        "medians_s": {name: timing.median for name, timing in result.timings.items()},
        "peer": result.peer if result.peers else None,
        "ratio": result.ratio if result.peers else None,
        "absent": result.absent,
        "peak_bytes": result.peak_bytes,
    }


def from_json(data: dict[str, Any]) -> Run:
    """For `load`; the first format is read as well."""
    if data["format"] not in (1, FORMAT):
        raise ValueError(f"format {data['format']}, this reads 1 and {FORMAT}")
    timings = _timings(data)
    results = [
        Result(
            timing["name"],
            timing["group"],
            timing["dtype"],
            timing["flops"],
            timing["bytes"],
            timings[timing["name"]],
            timing.get("absent", {}),
            timing.get("peak_bytes", {}),
        )
        for timing in data["timings"]
    ]
    return Run(
        machine=data["machine"],
        started=data["started"],
        gemm=data["gemm_flops_per_s"],
        bandwidth=data["bandwidth_bytes_per_s"],
        freed_memory_kept=data.get("freed_memory_kept", False),
        results=results,
        left_out=data.get("left_out", {}),
        window_shares=data["window_pair_shares"],
        memory=[MemoryPoint(**point) for point in data["peak_memory"]],
        errors=[Verdict(**verdict) for verdict in data.get("errors", [])],
    )


def _timings(data: dict[str, Any]) -> dict[str, dict[str, Timing]]:
    """By case and contestant."""

    def timing(samples: Sequence[float], about: dict[str, Any]) -> Timing:
        return Timing(tuple(samples), tuple(about.get("fresh_pages", ())))

    if data["format"] == 1:
        return {
            case["name"]: {
                name: timing(kept["samples"], kept) for name, kept in case["timings"].items()
            }
            for case in data["timings"]
        }
    found: dict[str, dict[str, Timing]] = {}
    for entry in data["benchmarks"]:
        about = entry["extra_info"]
        by_name = found.setdefault(about["case"], {})
        by_name[about["contestant"]] = timing(entry["stats"]["data"], about)
    return found

"""A run as a file, and back.

The file has the format and the statistics of pytest-benchmark, so that `pytest-benchmark compare`
reads it too; what that format has no place for is stored beside.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
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

_NAMES = {
    "gemm": "gemm_flops_per_s",
    "bandwidth": "bandwidth_bytes_per_s",
    "results": "timings",
    "window_shares": "window_pair_shares",
    "memory": "peak_memory",
}
"""The names of `Run`'s fields in the file, where they differ."""


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
        return from_json(json.loads(path.read_text()))
    except OSError as error:
        raise UnreadableError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnreadableError(f"{path} holds no stored run: {error!r}") from error


def as_json(run: Run) -> dict[str, Any]:
    """The content of the file."""
    return {
        "format": FORMAT,
        "version": pytest_benchmark.__version__,
        "datetime": run.started,
        "machine_info": run.machine,
        "commit_info": {"id": run.machine.get("commit", "unknown")},
        "benchmarks": [
            _benchmark(result, name) for result in run.results for name in result.timings
        ],
        **{_NAMES.get(name, name): value for name, value in asdict(run).items()},
        "timings": [_summary(result) for result in run.results],
    }


def _benchmark(result: Result, contestant: str) -> dict[str, Any]:
    """An entry of pytest-benchmark's."""
    timing = result.timings[contestant]
    stats: Any = Stats()
    for sample in timing.samples:
        stats.update(sample)
    name = f"{result.name} [{contestant}]"
    about = {"case": result.name, "contestant": contestant, "fresh_pages": timing.fresh_pages}
    return {
        "group": result.name,
        "name": name,
        "fullname": name,
        "params": None,
        "param": None,
        "extra_info": about,
        "options": {"disable_gc": True, "timer": "perf_counter", "warmup": True},
        "stats": {**stats.as_dict(), "iterations": 1, "data": stats.data},
    }


def _summary(result: Result) -> dict[str, Any]:
    about = asdict(result)
    del about["timings"]
    return {
        **about,
        "medians_s": {name: timing.median for name, timing in result.timings.items()},
        "peer": result.peer if result.peers else None,
        "ratio": result.ratio if result.peers else None,
    }


def from_json(data: dict[str, Any]) -> Run:
    """The run in the content of a file; the first format is read as well."""
    if data["format"] not in (1, FORMAT):
        raise ValueError(f"format {data['format']}, this reads 1 and {FORMAT}")
    timings = _timings(data)
    found = {field.name: data.get(_NAMES.get(field.name, field.name)) for field in fields(Run)}
    found["results"] = [
        Result(
            **{field.name: case[field.name] for field in fields(Result) if field.name in case}
            | {"timings": timings[case["name"]]}
        )
        for case in data["timings"]
    ]
    found["memory"] = [MemoryPoint(**point) for point in data["peak_memory"]]
    found["errors"] = [Verdict(**verdict) for verdict in data.get("errors", [])]
    return Run(**{name: value for name, value in found.items() if value is not None})


def _timings(data: dict[str, Any]) -> dict[str, dict[str, Timing]]:
    """The timings by case and contestant."""
    found: dict[str, dict[str, Timing]] = {}
    if data["format"] == 1:
        for case in data["timings"]:
            for name, stored in case["timings"].items():
                timing = Timing(tuple(stored["samples"]), tuple(stored.get("fresh_pages", ())))
                found.setdefault(case["name"], {})[name] = timing
    for entry in data.get("benchmarks", ()):
        about = entry["extra_info"]
        timing = Timing(tuple(entry["stats"]["data"]), tuple(about.get("fresh_pages", ())))
        found.setdefault(about["case"], {})[about["contestant"]] = timing
    return found

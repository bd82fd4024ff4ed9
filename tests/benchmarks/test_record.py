"""A run as a file: it comes back as it was, and pytest-benchmark reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import record
from benchmarks.runner import MemoryPoint, Run
from resformer_kernels.bench.timing import Result, Timing
from resformer_kernels.testing.verification import Verdict

RESULTS = sorted(record.RESULTS.glob("*.json"))


def a_run() -> Run:
    timings = {"ours": Timing((1.0, 1.1, 0.9)), "SDPA": Timing((2.0, 2.2, 1.8))}
    told = (timings, {"flash-attn": "not installed"}, {"ours": 5, "SDPA": 6})
    result = Result("attention forward B1", "attention forward", "bfloat16", 7, 9, *told)
    return Run(
        {"processor": "a processor", "commit": "0123456789ab"},
        "2026-01-01T00:00:00+00:00",
        {"bfloat16": 1e12},
        {"read": 4e10},
        freed_memory_kept=True,
        results=[result],
        memory=[MemoryPoint(4096, "bfloat16", 2, 64, 1000, "ours")],
        errors=[Verdict("mix_values", "a case", "bfloat16", "out", 0.5, 1.0)],
    )


def test_a_run_comes_back_as_it_was(tmp_path: Path) -> None:
    path = record.store(a_run(), tmp_path / "folder" / "run.json")
    assert record.load(path) == a_run()
    summary = json.loads(path.read_text())["timings"][0]
    assert summary["ratio"] == 2.0
    assert summary["medians_s"] == {"ours": 1.0, "SDPA": 2.0}


def test_pytest_benchmark_reads_it(tmp_path: Path) -> None:
    path = record.store(a_run(), tmp_path / "run.json")
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "attention forward B1 [ours]" in done.stdout


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_every_stored_run_is_readable(path: Path) -> None:
    run = record.load(path)
    assert run.results
    assert all(result.ours.median > 0 for result in run.results)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 3}', '{"format": 2}'])
def test_what_holds_no_run_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(record.UnreadableError, match=r"run\.json holds no stored run"):
        record.load(path)
    with pytest.raises(record.UnreadableError, match="No such file"):
        record.load(tmp_path / "missing.json")

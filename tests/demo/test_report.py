"""The report from full, partial and empty records."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

import torch

from resformer_kernels.bench import machine
from resformer_kernels.bench.timing import Result, Timing
from resformer_kernels.demo.corpus import Corpus
from resformer_kernels.demo.record import Record
from resformer_kernels.demo.report import RANKS_NOTHING, summary, write_report
from resformer_kernels.demo.training import ModelRun, Plan, configs
from resformer_kernels.demo.writing import Writing
from resformer_kernels.testing.verification import Verdict


def empty() -> Record:
    corpus = Corpus("letters", torch.zeros(10), torch.zeros(2), 3, 1, "by hand")
    return Record(
        machine.describe(),
        1.0,
        Plan(),
        datetime(2026, 1, 2, 3, 4),
        "resformer-kernels demo",
        corpus,
    )


def full() -> Record:
    record = empty()
    record.verdicts = [
        Verdict("value_residual_attention", "a case", dtype, tensor, error, 1e-3)
        for dtype in ("float32", "bfloat16")
        for tensor, error in (("out", 1e-4), ("dq", 0.0))
    ]
    record.cases_checked = record.cases_planned = 1
    record.gemm = {"float32": 2e11}
    record.results = [
        Result(
            f"attention {direction} B1 H2 T64 D8 causal float32",
            f"attention {direction}",
            "float32",
            10**9,
            10**6,
            {"ours": Timing((0.01, 0.01, 0.01)), "SDPA (B,T,H,D)": Timing((0.02, 0.02, 0.02))},
        )
        for direction in ("forward", "backward")
    ]
    record.benchmarks_planned = 2
    for name, config in configs(record.plan).items():
        run = ModelRun(name, config, 1000, 2**20, [8.0, 7.0, 6.0], [0.1, 0.1, 0.1])
        run.curve = [(0, 8.0), (2, 6.5)]
        run.final_bits, run.final_error, run.final_windows = 6.25, 0.01, 9
        record.runs.append(run)
    for name, cache in (("Transformer", 800), ("SVFormer", 500)):
        record.writings.append(
            Writing(name, "Once ", "upon\na time", 5, 11, cache, [0.1, 0.2, 0.1])
        )
    return record


def test_full_report(tmp_path: Path) -> None:
    path = write_report(full(), tmp_path / "new")
    text = path.read_text()
    for expected in (
        "4 tensors of 1 cases against float64, all within their budgets",
        "2.00 to 2.00 times torch's SDPA",
        "**2.00x**",
        "50% of GEMM",
        "| SVFormer | 1,000 | 3 | **6.250 ± 0.010** | 100 ms | 1.0 MiB |",
        RANKS_NOTHING,
        "| SVFormer | 110 | 500 |",
        "    Once […]upon\n    a time\n",
        "Transformer 110 tokens a second from 800 bytes, SVFormer 110",
    ):
        assert expected in text
    for image in re.findall(r"\]\((\w+\.png)\)", text):
        assert (path.parent / image).read_bytes().startswith(b"\x89PNG")
    results = json.loads((path.parent / "results.json").read_text())
    assert results["timings"][0]["ratio"] == 2.0
    assert results["models"][2]["final_bits"] == 6.25


def test_interrupted_report_says_where_and_shows_the_curve_so_far(tmp_path: Path) -> None:
    record = full()
    record.interrupted_in = "training"
    for run in record.runs:
        run.final_bits = run.final_error = None
        run.final_windows = 0
    text = write_report(record, tmp_path).read_text()
    assert "**Interrupted during training.**" in text
    assert "**6.500**" in text
    assert "Training was cut off" in text


def test_empty_report_invents_nothing(tmp_path: Path) -> None:
    record = empty()
    record.interrupted_in = "verification"
    text = write_report(record, tmp_path).read_text()
    assert text.count("Not reached.") == 4
    assert "Nothing was measured." in text
    assert not list(tmp_path.glob("*.png"))


def test_a_failure_is_told(tmp_path: Path) -> None:
    record = full()
    record.verdicts.append(Verdict("mix_values", "bad", "float32", "out", 2.0, 1.0))
    assert "1 over budget" in summary(record)[0]
    assert "**200%, OVER**" in write_report(record, tmp_path).read_text()

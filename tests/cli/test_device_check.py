"""`resformer-kernels device-check`, on small cases of a CPU in place of a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.workloads.device import SDPA_CUDNN, SDPA_FLASH
from resformer_kernels.cli import INTERRUPTED, main

ON_A_CPU = ("device-check", "--device", "cpu", "--workers", "2", "--minutes", "5")


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU Triton's kernels run in its interpreter alone: too slow to be tried here."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device-check"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], native: str) -> None:
    path = tmp_path / "cpu.json"
    begun = time.monotonic()
    assert main([*ON_A_CPU, "--out", str(path)]) == 0
    assert time.monotonic() - begun < 300
    printed = capsys.readouterr()
    for expected in ("ceilings measured", "Against float64", "Not here, and skipped", "best peer"):
        assert expected in printed.out
    assert "none failed" in printed.out
    assert "timings: 3 of 3" in printed.err
    stored: dict[str, Any] = json.loads(path.read_text())
    assert stored["kind"] == "device"
    assert stored["machine"]["device"] == "cpu"
    assert stored["failures"] == stored["unfinished"] == []
    assert len(stored["checks"]) == 5
    assert {check["backend"] for check in stored["checks"]} >= {native}
    assert "these are on cpu" in stored["absent_backends"]["value_residual_attention"]["flash_attn"]
    first = stored["timings"][0]
    assert first["name"] == "attention forward B1 Hq2 Hkv1 T64 D16 causal bfloat16"
    assert set(first["timings"]) == {"ours", SDPA_FLASH}
    assert len(first["timings"]["ours"]) == 7
    assert f"{first['name']}: {SDPA_CUDNN}" in stored["missing_peers"]


def test_kernels_that_fail_are_reported_and_the_run_goes_on(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    native: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert native == "native"
    # Every native kernel raises.
    monkeypatch.setenv("RESFORMER_CPU", "sse9")
    path = tmp_path / "cpu.json"
    assert main([*ON_A_CPU, "--out", str(path)]) == 1
    printed = capsys.readouterr()
    assert "FAILED check native: " in printed.err
    assert "Failed" in printed.out
    stored = json.loads(path.read_text())
    kinds = [failure["job"].split()[0] for failure in stored["failures"]]
    assert (kinds.count("check"), kinds.count("time")) == (5, 3)
    assert all("sse9" in failure["reason"] for failure in stored["failures"])
    assert [set(timing["timings"]) for timing in stored["timings"][:2]] == [{SDPA_FLASH}] * 2


def test_time_that_is_up_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu.json"
    begun = time.monotonic()
    assert main(["device-check", "--device", "cpu", "--minutes", "0.01", "--out", str(path)]) == 0
    assert time.monotonic() - begun < 60
    assert "not reached in the time" in capsys.readouterr().out
    assert len(json.loads(path.read_text())["unfinished"]) > 3


def test_an_interrupt_leaves_what_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import device_run

    def interrupt(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(device_run, "supervise", interrupt)
    path = tmp_path / "cpu.json"
    assert main([*ON_A_CPU, "--out", str(path)]) == INTERRUPTED
    assert "what was found is stored" in capsys.readouterr().err
    assert json.loads(path.read_text())["timings"] == []


BLOCKED = """
import sys
for name in ("rich", "rich.console", "rich.table", "numpy", "psutil", "matplotlib"):
    sys.modules[name] = None
import benchmarks.device_worker, benchmarks.device_run, benchmarks.device_report
from resformer_kernels.cli import main
sys.exit(main(["device-check"]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_needs_torch_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert "no CUDA device" in done.stderr

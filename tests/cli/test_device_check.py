"""`resformer-kernels device-check`, on small cases of a CPU in place of a GPU."""

from __future__ import annotations

import json
import os
import shlex
import signal
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

PLANTED = Path(__file__).parents[1] / "benchmarks" / "device" / "planted_worker.py"


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
    assert "peers: 9 of 9" in printed.err
    stored: dict[str, Any] = json.loads(path.read_text())
    assert stored["kind"] == "device"
    assert stored["machine"]["device"] == "cpu"
    assert stored["failures"] == stored["unfinished"] == []
    assert {check["kind"] for check in stored["checks"]} == {"smoke", "check", "large"}
    assert {check["backend"] for check in stored["checks"]} >= {native}
    assert "these are on cpu" in stored["absent_backends"]["value_residual_attention"]["flash_attn"]
    assert len(stored["timings"]) == 8
    first = stored["timings"][0]
    assert first["name"] == "attention forward B1 H2 T32 D16 causal bfloat16"
    assert set(first["timings"]) == {"ours", SDPA_FLASH}
    assert f"{first['name']}: {SDPA_CUDNN}" in stored["missing"]
    assert {file.name for file in tmp_path.iterdir()} == {"cpu.json", "cpu.txt", "cpu.log"}
    assert "Against float64" in (tmp_path / "cpu.txt").read_text()
    assert (tmp_path / "cpu.log").read_text() == printed.err
    # A complete run is not gone on with.
    short = ("--minutes", "0.01")
    assert main([*ON_A_CPU, *short, "--out", str(path)]) == 0
    assert "beginning anew: the run in" in capsys.readouterr().err


def test_kernels_that_fail_are_reported_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], native: str
) -> None:
    assert native == "native"
    path = tmp_path / "cpu.json"
    worker = shlex.join([str(PLANTED), "--raise"])
    assert main([*ON_A_CPU, "--out", str(path), "--worker", worker]) == 1
    printed = capsys.readouterr()
    assert "FAILED smoke native: " in printed.err
    assert "Failed" in printed.out
    stored = json.loads(path.read_text())
    kinds = [failure["job"].split()[0] for failure in stored["failures"]]
    assert {"smoke", "check", "large", "peers"} == set(kinds)
    assert kinds.count("peers") == 8
    assert all("sse9" in failure["reason"] for failure in stored["failures"])
    # An error is no crash.
    assert stored["crashes"] == stored["left_out"] == {}
    assert [set(timing["timings"]) for timing in stored["timings"][:2]] == [{SDPA_FLASH}] * 2


def test_time_that_is_up_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cpu.json"
    begun = time.monotonic()
    assert main(["device-check", "--device", "cpu", "--minutes", "0.01", "--out", str(path)]) == 0
    assert time.monotonic() - begun < 60
    printed = capsys.readouterr().out
    assert "not reached in the time" in printed
    assert "the same command again goes on" in printed
    assert len(json.loads(path.read_text())["unfinished"]) > 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_what_was_found(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "cpu.json"
    command = [sys.executable, "-m", "resformer_kernels.cli", *ON_A_CPU, "--out", str(path)]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert running.stderr is not None
    first = running.stderr.readline()
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert " jobs, 5 minutes, stored in" in first
    assert "what was found is stored" in err
    assert "jobs are left" in out
    assert running.returncode == INTERRUPTED
    assert json.loads(path.read_text())["timings"] == []


def test_only_its_like_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = tmp_path / "cpu.json", tmp_path / "other.json"
    other.write_text('{"kind": "bench"}')
    command = [*ON_A_CPU, "--out", str(path)]
    assert main([*command, "--resume", str(other)]) == 2
    assert "other.json is no run of device-check" in capsys.readouterr().err
    assert main([*command, "--bundle", str(tmp_path)]) == 2
    assert "is no bundle" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.slow
def test_a_dry_run_in_two_calls_with_kernels_that_crash_and_hang(
    tmp_path: Path, native: str
) -> None:
    """The interpreter and the CPU in place of the device; processes that really crash and hang."""
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    worker = shlex.join([str(PLANTED), native])
    command = [sys.executable, "-m", "resformer_kernels.cli", *ON_A_CPU, "--repeats", "3"]
    command += ["--worker", worker]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def call(*arguments: str) -> tuple[int, str, float]:
        begun = time.monotonic()
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, env=environment, timeout=300
        )
        return done.returncode, done.stderr + done.stdout, time.monotonic() - begun

    # The hang alone takes longer than that.
    code, told, seconds = call("--minutes", "0.4", "--out", str(first))
    assert code in (0, 1), told
    assert seconds < 0.4 * 60 + 30
    before = json.loads(first.read_text())
    assert before["unfinished"]
    assert "the same command again goes on" in told
    code, told, _ = call("--minutes", "4", "--resume", str(first), "--out", str(second))
    assert code == 1, told
    after = json.loads(second.read_text())
    assert after["unfinished"] == []
    assert len(after["calls"]) == 2
    assert f"going on from {first}: {len(before['done'])} jobs are done" in told
    # What was done is not done again.
    assert before["done"].items() <= after["done"].items()
    _assert_order(after)
    _assert_breaker(after, native)
    for expected in ("LEFT OUT from now on: native mix", "LEFT OUT: crashed or hung 2 times"):
        assert expected in told + (tmp_path / "first.log").read_text()
    assert "SIGSEGV" in (tmp_path / "second.txt").read_text()


def _assert_order(run: dict[str, Any]) -> None:
    assert list(run["seconds"]) == [
        *("smoke test", "checks", "native library", "large shapes", "peers"),
        *("configurations tried", "configurations timed"),
    ]
    smoke = [name for name in run["done"] if name.startswith("smoke triton")]
    assert "value_residual_attention" in smoke[0]
    assert "reservoir_scan" in smoke[-1]
    served = {(check["kind"], check["backend"]) for check in run["checks"]}
    assert served >= {(kind, "triton") for kind in ("smoke", "check", "large")}
    repeated = {(check["backend"], check["repeated"]) for check in run["checks"]}
    # Torch's own kernels promise no bits.
    assert {times for backend, times in repeated if backend == "sdpa"} == {1}
    every = [check for check in run["checks"] if check["backend"] != "sdpa"]
    assert {check["repeated"] for check in every if check["kind"] != "smoke"} == {3}
    assert len(run["tuned"]) == 2


def _assert_breaker(run: dict[str, Any], native: str) -> None:
    crashing, hanging = f"{native} mix", f"{native} embedding"
    assert len(run["crashes"][crashing]) >= 2
    assert all("SIGSEGV" in each for each in run["crashes"][crashing])
    assert len(run["crashes"][hanging]) >= 2
    assert all("not done after" in each for each in run["crashes"][hanging])
    assert set(run["left_out"].values()) == {crashing, hanging}
    # All others went on, after the processes that were lost.
    failed = {failure["job"].split(":")[0] for failure in run["failures"]}
    assert failed <= {f"{kind} {native}" for kind in ("smoke", "check", "large")}
    scans = [check for check in run["checks"] if check["op"] == "linear_scan"]
    assert {check["backend"] for check in scans} == {native, "triton"}
    assert len(run["timings"]) == 8


BLOCKED = """
import sys
for name in ("rich", "rich.console", "rich.table", "numpy", "psutil", "matplotlib"):
    sys.modules[name] = None
import benchmarks.device.worker, benchmarks.device.run, benchmarks.device.report
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

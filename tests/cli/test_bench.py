"""`resformer-kernels bench` on a registry of small cases."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import registry, runner
from benchmarks.workloads.attention import CPUAttention
from benchmarks.workloads.common import FLASH_ATTN
from benchmarks.workloads.mix import MixBenchmark
from resformer_kernels.bench import timing
from resformer_kernels.bench.attention import SDPA
from resformer_kernels.cli import bench, main
from resformer_kernels.mix import native as mix_native
from resformer_kernels.testing.verification import checks

ATTENTION = CPUAttention(*(1, 2, 2, 32, 8, torch.float32, "backward"), peers=(*SDPA, FLASH_ATTN))
MIX = MixBenchmark(2, 1, 32, 2, 8, torch.bfloat16, "forward")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Three quick cases, one length, ceilings that nobody measured, one thread, an empty folder."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = [
        ATTENTION,
        replace(ATTENTION, direction="forward", window=4),
        MIX,
    ]
    monkeypatch.setattr(registry, "cases", lambda *, quick: cases)  # noqa: ARG005
    monkeypatch.setattr(registry, "MEMORY_LENGTHS", (2048,))
    # One check an op: `verify` has tests of its own.
    few = {check.op: check for check in reversed(checks())}
    monkeypatch.setattr(runner, "checks", few.values)
    rates = {"float32": 1e11, "bfloat16": 4e11}
    monkeypatch.setattr(runner, "gemm_rates", lambda *_, **__: rates)
    monkeypatch.setattr(runner, "bandwidths", lambda **_: {"read": 4e10, "copy": 4e10})
    monkeypatch.setattr(bench, "_SAMPLE_SECONDS", 1e-4)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("small")
def test_everything_is_printed_and_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], native: str
) -> None:
    assert native == "native"
    assert main(["bench"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "ceilings",
        "of GEMM",
        "of copy",
        "time / pairs",
        "exponent",
        "threads",
        "MiB",
        "float64",
    ):
        assert expected in printed
    (path,) = tmp_path.glob("reports/bench-*/run.json")
    assert ATTENTION.name in (path.parent / "index.html").read_text()
    stored = json.loads(path.read_text())
    assert len(stored["timings"]) == 3
    first = stored["timings"][0]
    assert first["name"] == ATTENTION.name
    assert first["flops"] == ATTENTION.flops
    assert set(first["medians_s"]) == {"ours", "SDPA (B,H,T,D)", "SDPA (B,T,H,D)"}
    assert first["absent"] == {"flash-attn": "flash_attn is not installed"}
    assert first["peer"] in first["medians_s"]
    assert set(first["peak_bytes"]) == set(first["medians_s"])
    assert len(stored["benchmarks"][0]["stats"]["data"]) == 7
    assert {error["op"] for error in stored["errors"]} >= {"mix_values", "value_residual_attention"}
    assert {"commit", "threads", "torch", "processor"} <= set(stored["machine"])
    points = [(point["contestant"], point["length"]) for point in stored["peak_memory"]]
    assert points == [("ours", 2048), ("mix + SDPA", 2048)]


@pytest.mark.usefixtures("small")
def test_filter_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--filter", "attention backward", "--filter", "mix"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert [name.split()[0] for name in names] == ["attention", "mix_values"]
    assert names[1].endswith("[sum of products, stack and einsum]")
    for refused in (["--filter", "no such case"], ["--peer", "no such peer"]):
        assert main(["bench", *refused]) == 2
        assert "--list prints the names" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_peers_and_suites_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--suite", "window"]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert main(["bench", "--peer", "EINSUM", "(b,h,t,d)"]) == 0
    printed = capsys.readouterr().out
    assert "stack and einsum" in printed
    assert "sum of products" not in printed
    assert main(["bench", "--suite", "attention", "--peer", "flash-attn"]) == 0
    assert "flash_attn is not installed" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [], "a part of the suite is not stored by itself"


@pytest.mark.usefixtures("small")
def test_a_sleep_in_a_launcher_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], native: str
) -> None:
    assert native == "native"
    path = tmp_path / "run.json"
    mixes = ["bench", "--filter", "mix_values"]
    assert main([*mixes, "--json", str(path)]) == 0
    launch = mix_native.run

    def sleepy(*arguments: Any) -> Any:
        time.sleep(0.05)
        return launch(*arguments)

    monkeypatch.setattr(mix_native, "run", sleepy)
    capsys.readouterr()
    assert main([*mixes, "--compare", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "1 slower" in printed
    assert MIX.name in printed


@pytest.mark.usefixtures("small")
def test_noise_is_not_called_slower(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    # Of a clock that a busy machine jerks about: what the same code takes differs by a fifth.
    monkeypatch.setattr(timing, "host_timer", lambda call, _: (call(), rng.gauss(1, 0.1))[1])
    path = tmp_path / "run.json"
    assert main(["bench", "--filter", "causal", "--filter", "mix", "--json", str(path)]) == 0
    for _ in range(3):
        arguments = ["--filter", "causal", "--filter", "mix", "--compare", str(path)]
        assert main(["bench", *arguments]) == 0
        assert " 0 slower" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_what_an_interrupted_run_found_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    time_case = runner.time_case

    def until_mixing(case: Any, *args: Any, **kwargs: Any) -> Any:
        if case is MIX:
            raise KeyboardInterrupt
        return time_case(case, *args, **kwargs)

    monkeypatch.setattr(runner, "time_case", until_mixing)
    assert main(["bench", "--filter", "attention", "--filter", "mix", "--json", "run.json"]) == 130
    assert "interrupted" in capsys.readouterr().err
    stored = json.loads((tmp_path / "run.json").read_text())
    assert [timing["group"] for timing in stored["timings"]] == [
        "attention backward",
        "window forward",
    ]


@pytest.mark.usefixtures("small")
def test_stored_runs_are_shown_without_timing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    assert main(["bench", "--filter", "mix", "--json", str(path)]) == 0
    monkeypatch.delattr(runner, "time_cases")
    capsys.readouterr()
    assert main(["bench", "--from", str(path), "--compare", str(path)]) == 0
    printed = capsys.readouterr().out
    assert MIX.name in printed
    assert "1 cases are in the stored run too: 0 slower" in printed


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--from", "--compare"):
        assert main(["bench", option, str(tmp_path / "none.json")]) == 2
        assert "none.json: No such file" in capsys.readouterr().err


def test_without_a_registry_the_error_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("resformer_kernels.cli._CHECKOUT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["bench"]) == 2
    assert "run this from a checkout" in capsys.readouterr().err


def test_too_few_samples_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--samples", "3"])
    assert "must be at least 7" in capsys.readouterr().err

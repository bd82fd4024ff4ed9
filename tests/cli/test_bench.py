"""`resformer-kernels bench` on a registry of small cases."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from benchmarks import bench, registry, runner
from benchmarks.workloads.attention import CPUAttention
from benchmarks.workloads.common import FLASH_ATTN
from benchmarks.workloads.mix import MixBenchmark
from resformer_kernels.bench import timing
from resformer_kernels.bench.attention import SDPA
from resformer_kernels.cli import main
from resformer_kernels.mix import native as mix_native
from resformer_kernels.testing.verification import checks

ATTENTION = CPUAttention(*(1, 2, 2, 32, 8, torch.float32, "backward"), peers=(*SDPA, FLASH_ATTN))
MIX = MixBenchmark(2, 1, 32, 2, 8, torch.bfloat16, "forward")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Three quick cases, one length, invented ceilings, one thread, an empty folder."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cases = [ATTENTION, replace(ATTENTION, direction="forward", window=4), MIX]
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


Bench: TypeAlias = Callable[..., str]


@pytest.fixture
def printed_by(capsys: pytest.CaptureFixture[str]) -> Bench:
    """`printed_by(*arguments, code=0)`: what `bench` prints; where it breaks off, its errors."""

    def run(*arguments: object, code: int = 0) -> str:
        assert main(["bench", *map(str, arguments)]) == code
        captured = capsys.readouterr()
        return captured.out if code in (0, 1) else captured.err

    return run


@pytest.mark.usefixtures("small")
def test_everything_is_printed_and_stored(tmp_path: Path, printed_by: Bench, native: str) -> None:
    assert native == "native"
    printed = printed_by()
    told = ("ceilings", "of GEMM", "of copy", "time / pairs", "exponent", "threads", "float64")
    assert [text for text in (*told, "MiB") if text not in printed] == []
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
def test_filter_and_list(printed_by: Bench) -> None:
    printed = printed_by("--list", "--filter", "attention backward", "--filter", "mix")
    names = printed.splitlines()
    assert [name.split()[0] for name in names] == ["attention", "mix_values"]
    peers = "sum of products, addcmul, stack and einsum, einsum of stacked values"
    assert names[1].endswith(f"[{peers}]")
    for refused in (["--filter", "no such case"], ["--peer", "no such peer"]):
        assert "--list prints the names" in printed_by(*refused, code=2)


@pytest.mark.usefixtures("small")
def test_peers_and_suites_are_chosen(tmp_path: Path, printed_by: Bench) -> None:
    assert printed_by("--list", "--suite", "window").count("\n") == 1
    printed = printed_by("--peer", "EINSUM", "(b,h,t,d)")
    assert "stack and einsum" in printed
    assert "sum of products" not in printed
    absent = "flash_attn is not installed"
    assert absent in printed_by("--suite", "attention", "--peer", "flash-attn")
    assert list(tmp_path.iterdir()) == [], "a part of the suite is not stored by itself"


@pytest.mark.usefixtures("small")
def test_a_sleep_in_a_launcher_is_found(
    monkeypatch: pytest.MonkeyPatch, printed_by: Bench, native: str
) -> None:
    assert native == "native"
    printed_by("--filter", "mix_values", "--json", "run.json")
    launch = mix_native.run

    def sleepy(*arguments: Any) -> Any:
        time.sleep(0.05)
        return launch(*arguments)

    monkeypatch.setattr(mix_native, "run", sleepy)
    printed = printed_by("--filter", "mix_values", "--compare", "run.json", code=1)
    assert "1 slower" in printed
    assert MIX.name in printed


@pytest.mark.usefixtures("small")
def test_noise_is_not_called_slower(monkeypatch: pytest.MonkeyPatch, printed_by: Bench) -> None:
    rng = random.Random(0)
    # The clock of a busy machine: the times of the same code differ by a fifth.
    monkeypatch.setattr(timing, "host_timer", lambda call, _: (call(), rng.gauss(1, 0.1))[1])
    cases = ("--filter", "causal", "--filter", "mix")
    printed_by(*cases, "--json", "run.json")
    for _ in range(3):
        assert " 0 slower" in printed_by(*cases, "--compare", "run.json")


@pytest.mark.usefixtures("small")
def test_what_an_interrupted_run_found_is_kept(
    monkeypatch: pytest.MonkeyPatch, printed_by: Bench
) -> None:
    time_case = runner.time_case

    def until_mixing(case: Any, *args: Any, **kwargs: Any) -> Any:
        if case is MIX:
            raise KeyboardInterrupt
        return time_case(case, *args, **kwargs)

    monkeypatch.setattr(runner, "time_case", until_mixing)
    cases = ("--filter", "attention", "--filter", "mix")
    assert "interrupted" in printed_by(*cases, "--json", "run.json", code=130)
    stored = json.loads(Path("run.json").read_text())
    groups = [timing["group"] for timing in stored["timings"]]
    assert groups == ["attention backward", "window forward"]


@pytest.mark.usefixtures("small")
def test_stored_runs_are_shown_without_timing(
    monkeypatch: pytest.MonkeyPatch, printed_by: Bench
) -> None:
    printed_by("--filter", "mix", "--json", "run.json")
    monkeypatch.delattr(runner, "time_cases")
    printed = printed_by("--from", "run.json", "--compare", "run.json")
    assert MIX.name in printed
    assert "1 cases are in the stored run too: 0 slower" in printed


def test_what_is_no_run_is_refused(tmp_path: Path, printed_by: Bench) -> None:
    for option in ("--from", "--compare"):
        printed = printed_by(option, tmp_path / "none.json", code=2)
        assert "none.json: No such file" in printed


def test_without_a_registry_the_error_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, printed_by: Bench
) -> None:
    monkeypatch.setattr("resformer_kernels.cli._CHECKOUT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "run this from a checkout" in printed_by(code=2)


def test_too_few_samples_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--samples", "3"])
    assert "must be at least 7" in capsys.readouterr().err

"""`resformer-kernels bench` on a registry of small cases."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import registry
from resformer_kernels.cli import bench, main
from resformer_kernels.testing.workloads import AttentionBenchmark, MixBenchmark

ATTENTION = AttentionBenchmark(1, 2, 2, 32, 8, torch.float32, "backward")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three quick cases, two lengths, small ceilings."""
    cases = [
        ATTENTION,
        replace(ATTENTION, direction="forward", window=4),
        MixBenchmark(2, 1, 32, 2, 8, torch.bfloat16, "forward"),
    ]
    monkeypatch.setattr(registry, "cases", lambda *, quick: cases)  # noqa: ARG005
    monkeypatch.setattr(registry, "MEMORY_LENGTHS", (2048, 4096))
    monkeypatch.setattr("resformer_kernels.testing.ceilings._GEMM_SIZE", 64)
    monkeypatch.setattr("resformer_kernels.testing.ceilings._ARRAY_BYTES", 2**16)
    monkeypatch.setattr(bench, "_SAMPLE_SECONDS", 1e-4)


@pytest.mark.usefixtures("small")
def test_everything_is_printed_and_stored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], native: str
) -> None:
    assert native == "native"
    path = tmp_path / "machine.json"
    assert main(["bench", "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    for expected in ("ceilings", "of GEMM", "of copy", "time / pairs", "exponent", "threads"):
        assert expected in printed
    stored = json.loads(path.read_text())
    assert len(stored["timings"]) == 3
    first = stored["timings"][0]
    assert first["name"] == ATTENTION.name
    assert first["flops"] == ATTENTION.flops
    assert set(first["timings"]) == {"ours", "SDPA (B,H,T,D)", "SDPA (B,T,H,D)"}
    assert len(first["timings"]["ours"]["samples"]) == 7
    assert first["peer"] in first["timings"]
    assert {"commit", "threads", "torch", "processor"} <= set(stored["machine"])
    assert [point["length"] for point in stored["peak_memory"]] == [2048, 4096]


@pytest.mark.usefixtures("small")
def test_filter_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--filter", "attention backward", "--filter", "mix"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert [name.split()[0] for name in names] == ["attention", "mix_values"]
    assert main(["bench", "--filter", "no such case"]) == 2
    assert "--list prints the names" in capsys.readouterr().err


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

"""`resformer-kernels tune`: what it refuses, and a short search in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from resformer_kernels._triton import available
from resformer_kernels.cli import main

TABLE = Path(available.__file__).parents[1] / "attention" / "triton" / "configs.json"
needs_kernels = pytest.mark.skipif(
    not TABLE.exists() or importlib.util.find_spec("triton") is None,
    reason="attention has no Triton kernels here, or there is no Triton",
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_without_triton_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(available, "version_reason", lambda: "Triton is not installed")
    monkeypatch.setattr(available, "interpreted", lambda: True)
    assert main(["tune", "--device", "cpu"]) == 2
    assert "Triton is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--head-dim", "96"], ["--minutes", "0"]])
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["tune", *arguments])
    assert exit_info.value.code == 2
    assert "usage: resformer-kernels tune" in capsys.readouterr().err


@needs_kernels
def test_a_short_search_in_the_interpreter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    path = tmp_path / "configs.json"
    chosen = ("--head-dim", "64", "--direction", "forward", "--mask", "causal")
    arguments = (*chosen, "--device", "cpu", "--workers", "1", "--minutes", "0.5")
    assert main(["tune", *arguments, "--out", str(path)]) == 0
    printed = capsys.readouterr()
    assert "forward half D64 causal" in printed.out
    assert "trials not reached in the time" in printed.out
    assert "compiled and compared: " in printed.err
    written, before = json.loads(path.read_text()), json.loads(TABLE.read_text())
    assert written.keys() == before.keys()
    assert written["sm80"] == before["sm80"]

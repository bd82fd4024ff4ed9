"""`resformer-kernels verify`: its tables and its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import pytest
import torch

from resformer_kernels._core import extension
from resformer_kernels.cli import main, verify
from resformer_kernels.mix import native as native_mix
from resformer_kernels.testing.verification import Check, Verdict, checks

pytestmark = pytest.mark.usefixtures("two_checks")


@pytest.fixture
def two_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of two quick checks."""

    def few(dtypes: Sequence[torch.dtype], device: str) -> list[Check]:
        return [check for check in checks(dtypes, device=device) if check.op.startswith("mix")][:2]

    monkeypatch.setattr(verify, "checks", few)


def test_a_line_for_each_backend_that_serves(
    native: str, interpreter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify"]) == 0
    printed = capsys.readouterr().out
    for expected in ("mix_values", f"{native}, cpu", f"{interpreter}, cpu", "all within budget"):
        assert expected in printed
    assert "reference, cpu" not in printed
    assert "CPU path" in printed


def test_the_reference_stands_in_where_nothing_else_serves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(extension, "_reason", "it was not built")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["verify"]) == 0
    printed = capsys.readouterr().out
    assert "reference, cpu" in printed
    assert "not run: 2 cases with native on cpu: it was not built" in printed
    assert main(["verify", "--backend", "native"]) == 2
    assert "native serves no case here: it was not built" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_tensors_names_error_and_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--tensors", "--backend", "auto"]) == 0
    printed = capsys.readouterr().out
    for expected in ("mix_values", "dcoefficient", "budget", "auto, cpu"):
        assert expected in printed


def test_a_kernel_that_raises_fails(
    native: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_call: object) -> None:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(native_mix, "run", broken)
    assert main(["verify", "--backend", native]) == 1
    printed = capsys.readouterr().out
    said = "raised by native on cpu: mix_values, 2 sources, float32: no such\ninstruction"
    assert said in printed
    assert "2 failed" in printed


def test_all_lists_every_tensor_with_its_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--all", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    for expected in ("dv[0]", "dv[4]", "5 sources", "share"):
        assert expected in printed


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--json", "--backend", "reference", "--dtype", "bfloat16"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["dtype"] for row in rows} == {"bfloat16"}
    assert all(row["ok"] and row["error"] <= row["budget"] for row in rows)


def test_a_tensor_over_budget_fails_and_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*_arguments: object) -> Iterator[list[Verdict]]:
        yield [Verdict("mix_values", "broken", "float32", "out", 2.0, 1.0)]

    monkeypatch.setattr(verify, "verify", wrong)
    assert main(["verify", "--backend", "reference"]) == 1
    printed = capsys.readouterr().out
    for expected in ("Failed", "broken", "200%", "2 failed"):
        assert expected in printed

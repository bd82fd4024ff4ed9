"""`resformer-kernels verify`: its tables and its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from resformer_kernels.cli import main, verify
from resformer_kernels.testing.verification import Verdict, checks

pytestmark = pytest.mark.usefixtures("two_checks")


@pytest.fixture
def two_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of two quick checks."""
    monkeypatch.setattr(
        verify, "checks", lambda dtypes: [c for c in checks(dtypes) if c.op.startswith("mix")][:2]
    )


def test_summary_names_error_and_budget(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    printed = capsys.readouterr().out
    for expected in ("mix_values", "dcoefficient", "budget", "CPU path", "all within budget"):
        assert expected in printed


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
    assert main(["verify"]) == 1
    printed = capsys.readouterr().out
    for expected in ("Over budget", "broken", "200%", "1 over budget"):
        assert expected in printed

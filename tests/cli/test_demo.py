"""`resformer-kernels demo`, end to end and small."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resformer_kernels.cli import INTERRUPTED, main

pytest.importorskip("matplotlib")

SMALL = ("--dim", "16", "--layers", "2", "--heads", "2", "--seqlen", "32", "--batch", "2")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of text."""
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(12):
        (folder / f"{index}.txt").write_text(f"{index}: the quick brown fox. " * 300)
    return folder


def test_demo_end_to_end(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], native: str
) -> None:
    assert native == "native"
    out = tmp_path / "report"
    start = time.monotonic()
    code = main(["demo", "--minutes", "0.2", "--corpus", str(text), "--out", str(out), *SMALL])
    assert time.monotonic() - start < 60
    assert code == 0
    printed = capsys.readouterr().out
    for expected in (
        *("against float64", "ratio", "held-out bits per byte", "rank nothing"),
        "tokens a second",
    ):
        assert expected in printed
    assert "report.md" in printed.replace("\n", "")
    report = (out / "report.md").read_text()
    assert "Not reached" not in report
    assert "Minutes of training rank nothing" in report
    assert {path.name for path in out.glob("*.png")} == {
        *("errors.png", "speed.png", "learning.png", "cost.png")
    }


def test_interrupt_leaves_a_report(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    command = [
        *(sys.executable, "-m", "resformer_kernels.cli", "demo", "--minutes", "5"),
        *("--corpus", str(text), "--out", str(out), *SMALL),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    while "against float64" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == INTERRUPTED, printed
    assert "the report is partial" in printed
    assert "Interrupted during" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "/nonexistent/text"], "/nonexistent/text does not exist"),
        (["--dim", "15", "--heads", "2"], "dim must be a multiple of num_heads 2"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--out", str(tmp_path / "report"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--minutes", "nan"], ["--dim", "0"]])
def test_unusable_numbers_are_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["demo", *arguments])
    assert arguments[0] in capsys.readouterr().err

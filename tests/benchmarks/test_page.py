"""The report: one self-contained page about any run, for light and dark."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib")

from benchmarks import curves, figures, page, record, registry
from benchmarks.figures import Cases
from benchmarks.plots import PALETTE, look
from benchmarks.runner import MemoryPoint, Run
from resformer_kernels.bench.timing import OURS, Benchmark, Result, Timing
from resformer_kernels.cli import main
from resformer_kernels.testing.verification import Verdict

SVG = "{http://www.w3.org/2000/svg}"


def result(case: Benchmark) -> Result:
    """Ours takes 1 ms a case, its peers 2, 3, ... ms."""
    timings = {
        name: Timing(tuple(1e-3 * (place + 1) * (1 + 0.01 * i) for i in range(7)))
        for place, name in enumerate(case.makers())
    }
    dtype = str(case.dtype).removeprefix("torch.")
    peaks = {name: (place + 1) * 2**20 for place, name in enumerate(timings)}
    absent = {"flash-attn": "<not> installed"}
    return Result(case.name, case.group, dtype, case.flops, case.bytes, timings, absent, peaks)


@pytest.fixture(scope="module")
def whole() -> Run:
    """A run of every case of the registry."""
    return Run(
        {"processor": "a <processor>", "threads": 2, "torch": "2.13.0"},
        "2026-01-02T03:04:05+00:00",
        {"bfloat16": 1e12, "float32": 2e11},
        {"read": 4e10, "copy": 4e10},
        results=[result(case) for case in registry.cases() if case.group != "window forward"],
        memory=[MemoryPoint(t, "bfloat16", 2, 64, 4000 * t, OURS) for t in (4096, 8192)],
        errors=[Verdict("mix_values", "a case", "float32", "out", 0.5, 1.0)],
    )


@pytest.fixture(scope="module")
def drawings(whole: Run) -> dict[str, figures.Drawing]:
    """Its figures, by name."""
    return {drawing.name: drawing for drawing in figures.draw([whole])}


def test_every_figure_is_drawn(drawings: dict[str, figures.Drawing]) -> None:
    kinds = ("attention-forward", "attention-backward", "mix", "decode", "scan", "reservoir")
    expected = {f"speed-{kind}" for kind in (*kinds, "decode-shared", "decode-models", "scan-copy")}
    for direction in ("forward", "backward"):
        expected |= {f"length-{kind}-{direction}" for kind in ("time", "memory")}
    expected |= {f"decode-group{group}" for group in curves.DECODE_GROUPS}
    expected |= {"scan-t", "scan-n", "reservoir-n", "reservoir-t", "memory-training", "errors"}
    assert set(drawings) == expected
    for drawing in drawings.values():
        ElementTree.fromstring(drawing.svg)
        assert "var(--ours)" in drawing.svg
        stray = set(re.findall(r"#[0-9a-f]{6}\b", drawing.svg)) - {"#000000", "#ffffff"}
        assert stray == set(), f"{drawing.name} has colours that no scheme changes"
    for told in ("bandwidth of reading", "ours, one V for all layers"):
        assert told in drawings["decode-group4"].svg


def test_rows_of_a_panel_have_names_of_their_own(drawings: dict[str, figures.Drawing]) -> None:
    for panel in (each for name, each in drawings.items() if name.startswith("speed-")):
        texts = [text.text or "" for text in ElementTree.fromstring(panel.svg).iter(f"{SVG}text")]
        rows = [text for text in texts if text.endswith(("bf16", "f32", "c64"))]
        assert rows
        assert len(set(rows)) == len(rows), f"{panel.name}: {rows}"


def test_peers_of_a_panel_look_different(whole: Run) -> None:
    for group in {result.group for result in whole.results}:
        looks = {look(p) for r in whole.results if r.group == group for p in r.peers}
        seen = [(each.colour, each.marker) for each in looks]
        assert len(set(seen)) == len(seen), f"{group}: {sorted(looks)}"


def test_the_page_needs_nothing_else(whole: Run, tmp_path: Path) -> None:
    path = page.write([whole], tmp_path)
    text = path.read_text()
    # An element that is not closed would be an error.
    tags = [tag for element in ElementTree.fromstring(text).iter() for tag in element.items()]
    links = [value for name, value in tags if name.rpartition("}")[2] in ("src", "href")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    for value in (value for pair in PALETTE.values() for value in pair):
        assert value in text
    for told in ("a &lt;processor&gt;", "&lt;not&gt; installed", "prefers-color-scheme: dark"):
        assert told in text
    assert whole.results[0].name in text
    files = sorted((tmp_path / "figures").iterdir())
    assert len(files) == len(figures.draw([whole]))
    for file in files:
        ElementTree.parse(file)
        assert "prefers-color-scheme: dark" in file.read_text()


def test_of_two_runs_of_a_case_the_newer_counts(whole: Run) -> None:
    case = registry.cases()[0]
    old = Run({}, "2025-01-01", results=[result(case)])
    assert Cases([whole, old]).found[case.name][1] is whole
    assert Cases([old, whole]).found[case.name][1] is whole


def test_a_run_with_little_in_it_has_a_page_too(tmp_path: Path) -> None:
    text = page.write([Run({}, "2026-01-01T00:00:00+00:00")], tmp_path).read_text()
    assert "<h1>" in text
    assert "<figure" not in text


def test_a_page_is_made_of_stored_runs(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = record.store(whole, tmp_path / "run.json")
    assert main(["bench", "--from", str(path), "--html", str(tmp_path / "report")]) == 0
    assert "index.html" in capsys.readouterr().out
    assert (tmp_path / "report" / "index.html").exists()

"""The README is short, and its quotes and those of docs/ are up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import quotes

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def test_is_short() -> None:
    assert len(README.read_text().splitlines()) < 200


@pytest.mark.parametrize("name", ["README.md", *quotes.DOCUMENTS[1:]])
def test_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]*)(?:#[^)]*)?\)", text):
        assert (ROOT / name).parent.joinpath(target).exists(), target


def test_quotes_are_what_code_and_stored_runs_say() -> None:
    stale = [str(path.relative_to(ROOT)) for path, _ in quotes.stale()]
    assert stale == [], "run: python -m benchmarks.quotes"


def test_a_changed_figure_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = quotes.REPORT / "index.html"
    (tmp_path / "figures").mkdir()
    (tmp_path / "index.html").write_text(page.read_text().replace("1", "2", 1))
    (tmp_path / "figures" / "old.svg").write_text("nothing draws it")
    monkeypatch.setattr(quotes, "REPORT", tmp_path)
    found = {path.relative_to(tmp_path): text for path, text in quotes.stale()}
    assert found.pop(Path("index.html")) == page.read_text()
    assert found.pop(Path("figures/old.svg")) is None
    assert {str(name): text for name, text in found.items()} == {
        f"figures/{path.name}": path.read_text() for path in page.parent.glob("figures/*.svg")
    }


def test_every_quote_is_shown() -> None:
    shown = [
        name
        for document in quotes.DOCUMENTS
        for name in re.findall(r"<!-- quote: ([\w-]+) -->", (ROOT / document).read_text())
    ]
    assert sorted(shown) == sorted(quotes.QUOTES)


def test_a_changed_run_changes_its_quote(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = "decode B1 Hq8 Hkv8 T8192 D64, 12 layers, one V, bfloat16"
    run: quotes.Run = {
        "machine": {"processor": "P", "threads": 2, "native path": "avx2", "torch": "2.13.0"},
        "started": "2026-01-02T03:04:05+00:00",
        "timings": [
            {
                "name": "attention forward B1 causal bfloat16",
                "flops": 3_000_000_000,
                "medians_s": {"ours": 0.5, "SDPA": 1.0},
            },
            {"name": decode, "flops": 0, "medians_s": {"ours": 0.002}},
        ],
    }
    monkeypatch.setattr(quotes, "runs", lambda: {"machine": run})
    text = "<!-- quote: attention -->\nold\n<!-- end -->\n<!-- quote: others -->\n<!-- end -->\n"
    written = quotes.rewritten(text)
    assert "| P, 2 threads, avx2, torch 2.13.0, 2026-01-02 | forward, bfloat16 |" in written
    assert "| B1 causal | 2.00x, 6 GFLOP/s | | | |" in written
    assert "| case | P, 2 threads, avx2, torch 2.13.0, 2026-01-02 |\n" in written
    assert written.count(f"| {decode} | 2 ms |\n") == 1
    assert quotes.rewritten(written) == written


def test_a_peer_counts_only_where_its_own_layout_was_timed() -> None:
    ours, theirs = "SDPA (B,T,H,D)", "SDPA (B,H,T,D)"
    assert quotes.fastest_peer({"ours": 1.0, ours: 2.0}) is None
    assert quotes.fastest_peer({"ours": 1.0, ours: 2.0, theirs: 3.0}) == ours
    assert quotes.fastest_peer({"ours": 1.0, ours: 2.0, "SDPA": 1.5}) == "SDPA"

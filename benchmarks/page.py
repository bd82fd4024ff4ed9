"""The report: one HTML page that needs nothing else, from any number of runs."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import figure_style, figures
from benchmarks.compare import LEAST
from benchmarks.figure_data import Cases, Drawing
from benchmarks.report import absent
from benchmarks.runner import Run
from resformer_kernels.bench.tables import duration, rate_and_share
from resformer_kernels.bench.timing import Result

PAGE, FIGURES = "index.html", "figures"
_STYLESHEET = Path(__file__).parent / "page.css"

_TILES = (
    ("Attention, forward", "attention forward"),
    ("Attention, backward", "attention backward"),
    ("Mixing", "mix"),
    ("Decoding", "decode"),
    ("Whole models", "decode in transformers"),
    ("Linear scan", "scan"),
    ("Reservoirs", "reservoir"),
)


def write(runs: Sequence[Run], folder: Path) -> Path:
    """Write the page into `folder`, and each figure as a file of its own; the page's path."""
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, text in files(runs).items():
        (folder / name).write_text(text)
    return folder / PAGE


def files(runs: Sequence[Run]) -> dict[str, str]:
    """What `write` writes, by path in the folder; runs that hold the same make the same."""
    runs = sorted(runs, key=lambda run: run.started)
    drawings = figures.draw(runs)
    alone = {f"{FIGURES}/{d.name}.svg": figure_style.alone(d.svg) for d in drawings}
    return {PAGE: page(runs, drawings), **alone}


def page(runs: Sequence[Run], drawings: Sequence[Drawing]) -> str:
    """The whole page."""
    cases = Cases(runs)
    sections = dict.fromkeys(drawing.section for drawing in drawings)
    parts = [_header(runs), _tiles(cases)]
    parts += [_section(name, [d for d in drawings if d.section == name]) for name in sections]
    parts += [_absent(runs), _tables(runs), _method(), _machines(runs)]
    body = "\n".join(part for part in parts if part)
    style = (
        f":root {{ {figure_style.variables(0)} --page: #f5f6f8; --font: {figure_style.FONT}; }}\n"
        "@media (prefers-color-scheme: dark) { :root { "
        f"{figure_style.variables(1)} --page: #0e1217; }} }}\n" + _STYLESHEET.read_text()
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        "<title>resformer_kernels: benchmarks</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _header(runs: Sequence[Run]) -> str:
    newest = max(runs, key=lambda run: run.started)
    about = newest.machine
    facts = (
        str(about.get("processor", "unknown processor")),
        f"{about.get('threads', '?')} threads",
        f"kernels on the {about.get('native path', '?')} path",
        f"torch {about.get('torch', '?')}",
        newest.started[:10],
    )
    return (
        "<header>\n<h1>resformer_kernels</h1>\n"
        "<p>Value-residual attention, shared-value decoding, linear scans and reservoirs, each "
        "measured in turn with everything else installed that does the same.</p>\n"
        f'<p class="facts">{_spans(facts)}</p>\n</header>'
    )


def _spans(texts: Sequence[str]) -> str:
    return "".join(f"<span>{html.escape(text)}</span>" for text in texts)


def _tiles(cases: Cases) -> str:
    """The median speed-up of each kind over its fastest peer, with the range."""
    found = []
    for title, group in _TILES:
        ratios = [result.ratio for result in cases.group(group)]
        if not ratios:
            continue
        count = f"{len(ratios)} cases" if len(ratios) > 1 else "1 case"
        low, high = f"{min(ratios):.1f}", f"{max(ratios):.1f}"
        reach = f"{low} to {high}×" if low != high else f"{low}×"
        found.append(
            f'<div class="tile"><h3>{title}</h3><p class="big">{statistics.median(ratios):.1f}×</p>'
            f"<p>{reach}<br>{count}</p></div>"
        )
    if not found:
        return ""
    note = "The median over cases of the fastest peer's time as a multiple of ours, and the range."
    return f'<div class="tiles">{"".join(found)}</div>\n<p class="note">{note}</p>'


def _section(name: str, drawings: Sequence[Drawing]) -> str:
    cards = "\n".join(
        f'<figure id="{d.name}"><h3>{html.escape(d.title)}</h3>'
        f'<div role="img" aria-label="{html.escape(d.title)}">{d.svg}</div>'
        f"<figcaption>{html.escape(d.caption)}</figcaption></figure>"
        for d in drawings
    )
    return (
        f'<section>\n<h2>{html.escape(name)}</h2>\n<div class="grid">\n{cards}\n</div>\n</section>'
    )


def _absent(runs: Sequence[Run]) -> str:
    rows: dict[tuple[str, str], int] = {}
    for run in runs:
        for key, cases in absent(run).items():
            rows[key] = rows.get(key, 0) + cases
    if not rows:
        return ""
    cells = [(peer, reason, str(cases)) for (peer, reason), cases in rows.items()]
    table = _table(("peer", "why it took no part", "cases"), cells, words=2)
    return f"<section>\n<h2>Not measured here</h2>\n{table}\n</section>"


def _tables(runs: Sequence[Run]) -> str:
    """Every case of every run, folded away."""
    parts = []
    for run in runs:
        groups = dict.fromkeys(result.group for result in run.results)
        for group in groups:
            results = [result for result in run.results if result.group == group]
            table = _table(
                (
                    "case",
                    "ours",
                    "spread",
                    "fastest peer",
                    "its time",
                    "ratio",
                    "our rate",
                    "of the ceiling",
                    "memory of a call: ours, peer's",
                ),
                [_row(result, run) for result in results],
            )
            title = f"{group}: {len(results)} cases, {run.started[:16].replace('T', ' ')}"
            parts.append(f"<details><summary>{html.escape(title)}</summary>{table}</details>")
    return "<section>\n<h2>Every case</h2>\n" + "\n".join(parts) + "\n</section>" if parts else ""


def _row(result: Result, run: Run) -> tuple[str, ...]:
    rate, share = rate_and_share(
        result, run.gemm, run.bandwidth.get("copy"), run.bandwidth.get("read")
    )
    peer = result.peer if result.peers else ""
    sizes = [result.peak_bytes.get(name) for name in ("ours", peer)]
    memory = ", ".join(f"{size / 2**20:.1f} MiB" for size in sizes if size is not None)
    return (
        result.name,
        duration(result.ours.median),
        f"±{result.ours.spread:.1%}",
        peer,
        duration(result.timings[peer].median) if peer else "",
        f"{result.ratio:.2f}×" if peer else "",
        rate,
        share,
        memory,
    )


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """The first `words` columns are flush left."""

    def line(cells: Sequence[str], tag: str) -> str:
        classes = (' class="words"' if place < words else "" for place in range(len(cells)))
        inner = "".join(
            f"<{tag}{kind}>{html.escape(cell)}</{tag}>"
            for cell, kind in zip(cells, classes, strict=True)
        )
        return f"<tr>{inner}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    head = line(headings, "th")
    return f'<div class="wide"><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'


def _method() -> str:
    return (
        "<section>\n<h2>How it is measured</h2>\n<ul>\n"
        "<li>Ours and every peer take turns in one process; a figure is the median of at least "
        "seven samples of each, the spread half the distance of their quartiles.</li>\n"
        "<li>Mixing values is inside every timing of attention, ours and the peers', and so are "
        "its gradients. The backward is timed alone.</li>\n"
        "<li>Ceilings are measured in the same run: torch's product of 2048² matrices in each "
        "dtype, and the bandwidth of reading and of copying 256 MiB.</li>\n"
        "<li>FLOPs count attended pairs; bytes count each tensor once. Memory is what resident "
        "memory grew by at the peak of one call.</li>\n"
        "<li><code>resformer-kernels bench --compare FILE</code> calls a case slower when its "
        "median moved further than the quartiles of both runs are apart and by more than "
        f"{LEAST:.0%}, twice, and its peers did not.</li>\n"
        "</ul>\n</section>"
    )


def _machines(runs: Sequence[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.machine))
    rows = [(key, *(str(run.machine.get(key, "")) for run in runs)) for key in keys]
    for dtype in dict.fromkeys(dtype for run in runs for dtype in run.gemm):
        rates = (f"{run.gemm.get(dtype, 0) / 1e9:.0f} GFLOP/s" for run in runs)
        rows.append((f"GEMM, {dtype}", *rates))
    for kind in dict.fromkeys(kind for run in runs for kind in run.bandwidth):
        speeds = (f"{run.bandwidth.get(kind, 0) / 1e9:.1f} GB/s" for run in runs)
        rows.append((f"bandwidth, {kind}", *speeds))
    headings = ("", *(run.started[:16].replace("T", " ") for run in runs))
    return f"<section>\n<h2>Machine and versions</h2>\n{_table(headings, rows)}\n</section>"

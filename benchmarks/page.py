"""The report: one self-contained HTML page about any number of runs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import jinja2

from benchmarks import figures, plots
from benchmarks.compare import LEAST
from benchmarks.report import absent, ceilings
from benchmarks.runner import Run
from resformer_kernels.bench.tables import duration, rate_and_share
from resformer_kernels.bench.timing import OURS, Result

PAGE, FIGURES = "index.html", "figures"
_FOLDER = Path(__file__).parent


def write(runs: Sequence[Run], folder: Path) -> Path:
    """Write the page into `folder`, and each figure as a file of its own; the page's path."""
    (folder / FIGURES).mkdir(parents=True, exist_ok=True)
    for name, text in files(runs).items():
        (folder / name).write_text(text)
    return folder / PAGE


def files(runs: Sequence[Run]) -> dict[str, str]:
    """What `write` writes, by path in the folder; equal runs give equal files."""
    runs = sorted(runs, key=lambda run: run.started)
    drawings = figures.draw(runs)
    alone = {f"{FIGURES}/{d.name}.svg": plots.alone(d.svg) for d in drawings}
    return {PAGE: _page(runs, drawings), **alone}


def _page(runs: Sequence[Run], drawings: Sequence[figures.Drawing]) -> str:
    template = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    ).from_string((_FOLDER / "page.html").read_text())
    absences = sum(map(absent, runs), Counter[tuple[str, str]]())
    return template.render(
        plots=plots,
        stylesheet=(_FOLDER / "page.css").read_text(),
        runs=runs,
        cases=figures.Cases(runs),
        median=statistics.median,
        sections={s: list(found) for s, found in groupby(drawings, lambda d: d.section)},
        absent=[(*names, cases) for names, cases in absences.items()],
        tables=_tables(runs),
        least=LEAST,
        machines=_machines(runs),
    )


def _when(run: Run) -> str:
    return run.started[:16].replace("T", " ")


def _tables(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """The title and the rows of a table for each run and group."""
    return [
        (f"{group}: {len(rows)} cases, {_when(run)}", rows)
        for run in runs
        for group in dict.fromkeys(result.group for result in run.results)
        if (rows := [_row(result, run) for result in run.results if result.group == group])
    ]


def _row(result: Result, run: Run) -> tuple[str, ...]:
    peer = result.peer if result.peers else ""
    sizes = [result.peak_bytes.get(name) for name in (OURS, peer)]
    return (
        result.name,
        duration(result.ours.median),
        f"±{result.ours.spread:.1%}",
        peer,
        duration(result.timings[peer].median) if peer else "",
        f"{result.ratio:.2f}×" if peer else "",
        *rate_and_share(result, *ceilings(run)),
        ", ".join(f"{size / 2**20:.1f} MiB" for size in sizes if size is not None),
    )


def _machines(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """A table of machines and ceilings, a column for each run, under its headings."""
    rows = [("", *map(_when, runs))]
    for key in dict.fromkeys(key for run in runs for key in run.machine):
        rows.append((key, *(str(run.machine.get(key, "")) for run in runs)))
    for dtype in dict.fromkeys(dtype for run in runs for dtype in run.gemm):
        rates = (f"{run.gemm.get(dtype, 0) / 1e9:.0f} GFLOP/s" for run in runs)
        rows.append((f"GEMM, {dtype}", *rates))
    for kind in dict.fromkeys(kind for run in runs for kind in run.bandwidth):
        speeds = (f"{run.bandwidth.get(kind, 0) / 1e9:.1f} GB/s" for run in runs)
        rows.append((f"bandwidth, {kind}", *speeds))
    return rows

"""The report: one HTML page that needs nothing else, from any number of runs."""

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

_TILES = {
    "Attention, forward": "attention forward",
    "Attention, backward": "attention backward",
    "Mixing": "mix",
    "Decoding": "decode",
    "Whole models": "decode in transformers",
    "Linear scan": "scan",
    "Reservoirs": "reservoir",
}
"""The group of each tile."""


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
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    cases = figures.Cases(runs)
    absences = sum(map(absent, runs), Counter[tuple[str, str]]())
    tiles = {title: [r.ratio for r in cases.group(group)] for title, group in _TILES.items()}
    return environment.get_template("page.html").render(
        light=plots.variables(0),
        dark=plots.variables(1),
        font=plots.FONT,
        stylesheet=(_FOLDER / "page.css").read_text(),
        newest=runs[-1],
        tiles={title: ratios for title, ratios in tiles.items() if ratios},
        median=statistics.median,
        sections={s: list(found) for s, found in groupby(drawings, lambda d: d.section)},
        absent=[(*names, cases) for names, cases in absences.items()],
        tables=_tables(runs),
        least=LEAST,
        machine_headings=("", *map(_when, runs)),
        machines=_machines(runs),
    )


def _when(run: Run) -> str:
    return run.started[:16].replace("T", " ")


def _tables(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, ...]]]]:
    """The title and the rows of a table for each run and group."""
    found: dict[tuple[int, str], list[tuple[str, ...]]] = {}
    for place, run in enumerate(runs):
        for result in run.results:
            found.setdefault((place, result.group), []).append(_row(result, run))
    return [
        (f"{group}: {len(rows)} cases, {_when(runs[place])}", rows)
        for (place, group), rows in found.items()
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
    """What each run tells of its machine and its ceilings, a column for each run."""
    columns = [
        {
            **{key: str(value) for key, value in run.machine.items()},
            **{f"GEMM, {dtype}": f"{rate / 1e9:.0f} GFLOP/s" for dtype, rate in run.gemm.items()},
            **{f"bandwidth, {k}": f"{rate / 1e9:.1f} GB/s" for k, rate in run.bandwidth.items()},
        }
        for run in runs
    ]
    keys = dict.fromkeys(key for column in columns for key in column)
    return [(key, *(column.get(key, "") for column in columns)) for key in keys]

"""Tables that more than one command prints, and the format of their numbers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from resformer_kernels.bench.timing import OURS, Result
from resformer_kernels.testing.verification import Verdict


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1.0:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def blank_table(words: Iterable[str], numbers: Iterable[str], title: str | None = None) -> Table:
    """An empty table: columns of words, which fold, then columns of numbers, flush right."""
    empty = Table(header_style="bold", title=title, title_justify="left")
    for heading in words:
        empty.add_column(heading, overflow="fold")
    for heading in numbers:
        empty.add_column(heading, justify="right", no_wrap=True)
    return empty


def markdown_rows(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of text as a table in Markdown."""
    rule = ["---"] * len(headings)
    return "\n".join(
        "|" + "".join(f" {cell} |" if cell else " |" for cell in row)
        for row in (headings, rule, *rows)
    )


def speed_table(
    results: Sequence[Result],
    gemm: Mapping[str, float],
    copy_bandwidth: float | None = None,
    read_bandwidth: float | None = None,
) -> Table:
    """Ours beside the fastest peer of each case, and our share of the measured ceiling.

    Args:
        results: the timed cases.
        gemm: FLOP/s of a matrix product, by dtype.
        copy_bandwidth: bytes a second, the ceiling of cases without FLOPs.
        read_bandwidth: bytes a second, the ceiling of decoding, which only reads.
    """
    memory = ["MiB, peer's"] if any(result.peak_bytes for result in results) else []
    found = blank_table(["case"], ["ours", "peer", "ratio", "ours, rate", "ceiling", *memory])
    found.add_column("fastest peer", no_wrap=True)
    for place, result in enumerate(results):
        if place and result.group != results[place - 1].group:
            found.add_section()
        peaks = (result.peak_bytes.get(name) for name in (OURS, result.peer))
        sizes = ["" if peak is None else f"{peak / 2**20:.1f}" for peak in peaks]
        colour = "green" if result.ratio >= 1 else "yellow"
        found.add_row(
            result.name,
            duration(result.ours.median),
            duration(result.timings[result.peer].median),
            f"[{colour}]{result.ratio:.2f}x",
            *rate_and_share(result, gemm, copy_bandwidth, read_bandwidth),
            *(", ".join(sizes) for _ in memory),
            result.peer,
        )
    return found


def rate_and_share(
    result: Result,
    gemm: Mapping[str, float],
    copy_bandwidth: float | None,
    read_bandwidth: float | None = None,
) -> tuple[str, str]:
    """Our rate with its unit, and its share of the ceiling with the ceiling's name."""
    if result.flops:
        work, ceiling, name, form = result.flops, gemm.get(result.dtype), "GEMM", "{:.0f} GFLOP/s"
    elif result.group.startswith("decode"):
        work, ceiling, name, form = result.bytes, read_bandwidth, "read", "{:.1f} GB/s"
    else:
        work, ceiling, name, form = result.bytes, copy_bandwidth, "copy", "{:.1f} GB/s"
    rate = work / result.ours.median
    return form.format(rate / 1e9), f"{rate / ceiling:.0%} of {name}" if ceiling else ""


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Collection[str] = (),
    fold: Collection[str] | None = None,
    group: int = 0,
    title: str | None = None,
) -> Table:
    """A table of rows, in rich's markup.

    Args:
        headings: headings of the columns.
        rows: cells of each row.
        right: columns aligned to the right.
        fold: columns whose cells wrap where the terminal is narrow; None: all of them.
        group: number of leading cells that name a row's group; a line separates groups.
        title: printed above the table.
    """
    made = Table(title=title, title_justify="left", header_style="bold")
    for heading in headings:
        made.add_column(
            heading,
            justify="right" if heading in right else "left",
            no_wrap=fold is not None and heading not in fold,
            overflow="fold",
        )
    previous: Sequence[str] = ()
    for row in rows:
        if previous and row[:group] != previous[:group]:
            made.add_section()
        made.add_row(*row)
        previous = row
    return made


def pivot(
    names: Sequence[str],
    cells: Iterable[tuple[tuple[str, ...], str, str]],
    *,
    numbers: bool = False,
    group: int = 0,
    title: str | None = None,
) -> Table:
    """A table of cells, whose rows and columns stand in the order in which they first appear.

    Args:
        names: headings of the leading columns, which hold each row's name.
        cells: (row, column, content) of each; combinations that are missing are left blank.
        numbers: whether the cells are aligned to the right and never wrap.
        group: as of `table`.
        title: as of `table`.
    """
    by_row: dict[tuple[str, ...], dict[str, str]] = {}
    for row, column, content in cells:
        by_row.setdefault(row, {})[column] = content
    columns = list(dict.fromkeys(column for found in by_row.values() for column in found))
    rows = [(*row, *(found.get(column, "") for column in columns)) for row, found in by_row.items()]
    right, fold = (columns, names[:1]) if numbers else ((), None)
    return table((*names, *columns), rows, right=right, fold=fold, group=group, title=title)


def markdown(found: Table, bold: Collection[str] = ()) -> str:
    """A table in Markdown. Bold cells stay bold, other styles go.

    Args:
        found: the table, as printed in the terminal.
        bold: headings of columns to set in bold.
    """
    columns = []
    for column in found.columns:
        cells = [_plain(str(cell)) for cell in column.cells]
        if column.header in bold:
            cells = [f"**{cell}**" for cell in cells]
        rule = "---:" if column.justify == "right" else "---"
        columns.append([str(column.header), rule, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


def _plain(cell: str) -> str:
    return Text.from_markup(re.sub(r"\[bold[^]]*\](.+?)(?:\[/\]|$)", r"**\1**", cell)).plain


def worst(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The verdict of each op, tensor and dtype that is closest to its budget."""
    found: dict[tuple[str, str, str], Verdict] = {}
    for verdict in verdicts:
        key = (verdict.op, verdict.tensor.split("[")[0], verdict.dtype)
        if key not in found or verdict.share > found[key].share:
            found[key] = verdict
    return list(found.values())


def summary_table(verdicts: Sequence[Verdict]) -> Table:
    """The worst error of each tensor over its budget, a column a dtype."""
    cells = [
        (
            (v.op.removeprefix("value_residual_"), v.tensor.split("[")[0]),
            v.dtype,
            f"{v.error:.0e} / {v.budget:.0e} {_share(v)}",
        )
        for v in sorted(worst(verdicts), key=lambda v: v.op)
    ]
    title = "Error / budget, the worst case of each tensor (Frobenius norms, against float64)"
    return pivot(("op", "tensor"), cells, numbers=True, group=1, title=title)


def verdict_table(verdicts: Iterable[Verdict], title: str) -> Table:
    """Errors and budgets as a table; both are Frobenius norms."""
    headings = ("op", "dtype", "backend", "tensor", "error", "budget", "share", "case")
    rows = [
        (
            v.op.removeprefix("value_residual_"),
            v.dtype,
            f"{v.backend}, {v.device}",
            v.tensor,
            f"{v.error:.2e}",
            f"{v.budget:.2e}",
            _share(v),
            v.case,
        )
        for v in verdicts
    ]
    numbers = ("error", "budget", "share")
    return table(headings, rows, right=numbers, fold=("case",), group=2, title=title)


def _share(verdict: Verdict) -> str:
    if verdict.ok:
        return f"[green]{verdict.share:4.0%}[/]"
    return f"[bold red]{verdict.share:.0%}, OVER[/]"

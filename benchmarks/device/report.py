"""The tables of `resformer-kernels device-check`. Rich draws them where it is installed."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.device_run import DeviceRun
from resformer_kernels.bench.timing import OURS
from resformer_kernels.testing.verification import share


@dataclass(frozen=True)
class Sheet:
    """A table. Its first column is left-aligned, and the others too where they hold words."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: bool = False

    def plain(self) -> str:
        """The table as plain text."""
        columns = list(zip(self.headings, *self.rows, strict=True))
        widths = [max(len(cell) for cell in column) for column in columns]

        def line(cells: Sequence[str]) -> str:
            first, *others = (
                cell.rjust(width) if place and not self.words else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return "  ".join([first, *others]).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.title, line(self.headings), rule, *map(line, self.rows)])


def show(sheet: Sheet, width: int | None = None) -> None:
    """Print a table."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(sheet.plain(), end="\n\n")
        return
    table = Table(title=sheet.title, title_justify="left", header_style="bold")
    for place, heading in enumerate(sheet.headings):
        number = place > 0 and not sheet.words
        table.add_column(heading, justify="right" if number else "left", no_wrap=number)
    for row in sheet.rows:
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else width or 180).print(table)


def sheets(run: DeviceRun) -> list[Sheet]:
    """Every table, the most important last."""
    found = [_checks(run)] if run.checks else []
    found += [_absent(run)] if any(run.absent().values()) else []
    found += _timings(run)
    found += [_failures(run)] if run.failures else []
    return found


def headline(run: DeviceRun) -> str:
    """The device and its ceilings, in a line each."""
    about: dict[str, Any] = run.ceilings.get("machine", {})
    lines = [", ".join(f"{name} {value}" for name, value in about.items())]
    gemm: dict[str, float] = run.ceilings.get("gemm_flops_per_s", {})
    speeds: dict[str, float] = run.ceilings.get("bandwidth_bytes_per_s", {})
    rates = [f"GEMM {name} {rate / 1e12:.0f} TFLOP/s" for name, rate in gemm.items()]
    rates += [f"{name} {rate / 1e12:.2f} TB/s" for name, rate in speeds.items()]
    lines.append(f"ceilings measured in this run: {', '.join(rates) or 'none'}")
    clocks = [
        f"{when} {', '.join(f'{name} {value}' for name, value in read.items())}"
        for when in ("before", "after")
        if (read := run.ceilings.get(f"readings_{when}"))
    ]
    return "\n".join([*lines, *(["; ".join(clocks)] if clocks else [])])


def _checks(run: DeviceRun) -> Sheet:
    """The worst share of its budget of each tensor, by backend and op."""
    worst: dict[tuple[str, str, str], dict[str, float]] = {}
    counts: Counter[tuple[str, str, str]] = Counter()
    for check in run.checks:
        key = (check["backend"], check["op"], check["verdicts"][0]["dtype"])
        counts[key] += 1
        shares = worst.setdefault(key, {})
        for verdict in check["verdicts"]:
            tensor = verdict["tensor"].split("[")[0]
            found = share(float(verdict["error"]), float(verdict["budget"]))
            shares[tensor] = max(shares.get(tensor, 0.0), found)
    rows = []
    for key, shares in sorted(worst.items()):
        tensor, most = max(shares.items(), key=lambda item: item[1])
        rows.append((" ".join(key), str(counts[key]), tensor, f"{most:.0%}"))
    headings = ("backend, op, dtype", "cases", "worst tensor", "error / budget")
    return Sheet("Against float64", headings, tuple(rows))


def _absent(run: DeviceRun) -> Sheet:
    rows = [
        (op, name, reason)
        for op, reasons in run.absent().items()
        for name, reason in reasons.items()
    ]
    return Sheet("Not here, and skipped", ("op", "backend", "why"), tuple(rows), words=True)


def _timings(run: DeviceRun) -> list[Sheet]:
    found = []
    groups = dict.fromkeys(timing["group"] for timing in run.timings)
    for group in groups:
        timings = [timing for timing in run.timings if timing["group"] == group]
        names = list(dict.fromkeys(name for timing in timings for name in timing["timings"]))
        headings = ("case", *names, "ours / best peer")
        rows = tuple(_timing_row(run, timing, names) for timing in timings)
        unit = "TFLOP/s, share of GEMM" if timings[0]["flops"] else "TB/s, share of copy"
        found.append(Sheet(f"{group}: {unit}; mixing is inside every timing", headings, rows))
    return found


def _timing_row(run: DeviceRun, timing: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    medians = {name: statistics.median(samples) for name, samples in timing["timings"].items()}
    work = timing["flops"] or timing["bytes"]
    if timing["flops"]:
        ceiling = run.ceilings.get("gemm_flops_per_s", {}).get(timing["dtype"])
    else:
        ceiling = run.ceilings.get("bandwidth_bytes_per_s", {}).get("copy")
    cells = []
    for name in names:
        if name not in medians:
            cells.append("")
            continue
        rate = work / medians[name]
        digits = f"{rate / 1e12:.0f}" if timing["flops"] else f"{rate / 1e12:.2f}"
        cells.append(f"{digits} {rate / ceiling:4.0%}" if ceiling else digits)
    peers = [seconds for name, seconds in medians.items() if name != OURS]
    ratio = f"{min(peers) / medians[OURS]:.2f}x" if OURS in medians and peers else ""
    case = timing["name"].removeprefix(f"{timing['group']} ").removesuffix(f" {timing['dtype']}")
    return (case, *cells, ratio)


def _failures(run: DeviceRun) -> Sheet:
    rows = [(f["job"], f["part"], f["reason"]) for f in run.failures]
    return Sheet("Failed", ("job", "part", "reason"), tuple(rows), words=True)

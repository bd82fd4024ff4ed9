"""The tables of `resformer-kernels device-check`. Rich draws them where it is installed."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import tuning
from benchmarks import tuning_space as space
from benchmarks.device import tools
from benchmarks.device.record import CRASHES, DeviceRun
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
    found = [_phases(run)] if run.seconds else []
    found += [_absent(run)] if any(run.absent().values()) else []
    found += [_checks(run)] if run.checks else []
    found += _timings(run)
    found += [_tools(run)] if run.tools else []
    search = searched(run)
    found += [tuned(search, list(search.seconds))] if search.seconds else []
    found += [_left_out(run)] if run.left_out else []
    found += [_failures(run)] if run.failures else []
    return found


def headline(run: DeviceRun) -> str:
    """The device, its ceilings and its clocks, in a line each."""
    lines = [", ".join(f"{name} {value}" for name, value in run.machine.items())]
    gemm: dict[str, float] = run.ceilings.get("gemm_flops_per_s", {})
    speeds: dict[str, float] = run.ceilings.get("bandwidth_bytes_per_s", {})
    rates = [f"GEMM {name} {rate / 1e12:.4g} TFLOP/s" for name, rate in gemm.items()]
    rates += [f"{name} {rate / 1e12:.3g} TB/s" for name, rate in speeds.items()]
    lines.append(f"ceilings measured in this run: {', '.join(rates) or 'none yet'}")
    lines.append(f"clocks: {_clocks(run)}")
    if run.rejected:
        many = f"{len(run.rejected)} of {len(run.rejected) + len(run.tried)}"
        lines.append(f"configurations that do not compile or are not right: {many}")
    if run.triton:
        counts = (run.triton.get(name, 0) for name in ("compiled", "cached"))
        lines.append("Triton: {} kernels compiled here, {} found in its cache".format(*counts))
    lines += [f"{name}: {text}" for name, text in run.notes.items()]
    return "\n".join([*lines, *tools.absent()])


def verdict(run: DeviceRun) -> str:
    """The outcome in a few words."""
    tensors = sum(len(check["verdicts"]) for check in run.checks)
    repeated = sum(check["repeated"] > 1 for check in run.checks)
    failed = f"{len(run.failures)} FAILED" if run.failures else "none failed"
    out = f"; {len(run.left_out)} LEFT OUT" if run.left_out else ""
    left = f"; {len(run.unfinished)} not reached in the time" if run.unfinished else ""
    return (
        f"{len(run.checks)} cases ({tensors} tensors) against float64, {repeated} of them run "
        f"again for the same bits, {len(run.timings)} cases timed, {len(run.tuned)} configurations "
        f"timed: {failed}{out}{left}"
    )


def configs(run: DeviceRun) -> str:
    """Attention's table with what was faster here, as its file has it; "" where nothing was."""
    search = searched(run)
    return space.dumps(search.new_table()) + "\n" if search.winners() else ""


def _clocks(run: DeviceRun) -> str:
    """Before and after the matrix products, and the worst of what held them back in a timing."""
    read = [run.ceilings.get(f"readings_{when}") for when in ("before", "after")]
    during = [timing["readings"] for timing in run.timings if "readings" in timing]
    every: list[dict[str, str]] = [each for each in (*read, *during) if each]
    if not every:
        return "not read yet"
    unread = next((each["unread"] for each in every if "unread" in each), None)
    if unread is not None:
        return unread
    told = [
        f"{when} {', '.join(f'{name} {value}' for name, value in each.items())}"
        for when, each in zip(("before", "after"), read, strict=True)
        if each
    ]
    slowed = Counter(each["throttled"] for each in during if each["throttled"] != "no")
    reasons = ", ".join(f"{count} by {reason}" for reason, count in slowed.items())
    return "; ".join([*told, f"of {len(during)} timings slowed: {reasons or 'none'}"])


def _phases(run: DeviceRun) -> Sheet:
    rows = [(name, f"{seconds:.0f}") for name, seconds in run.seconds.items()]
    total = sum(call["seconds"] for call in run.calls)
    calls = f"{len(run.calls)} call{'s' * (len(run.calls) > 1)}"
    return Sheet(f"Seconds, of {total:.0f} in {calls}", ("phase", "seconds"), tuple(rows))


def _checks(run: DeviceRun) -> Sheet:
    """The worst share of its budget of each tensor, by kind, backend, op and dtype."""
    worst: dict[tuple[str, ...], dict[str, float]] = {}
    counts: Counter[tuple[str, ...]] = Counter()
    repeated: dict[tuple[str, ...], int] = {}
    other: Counter[tuple[str, ...]] = Counter()
    for check in run.checks:
        which: tuple[str, ...] = (
            check["kind"],
            check["backend"],
            check["op"],
            check["verdicts"][0]["dtype"],
        )
        counts[which] += 1
        repeated[which] = min(repeated.get(which, check["repeated"]), check["repeated"])
        other[which] += bool(check["differing"])
        shares = worst.setdefault(which, {})
        for verdict in check["verdicts"]:
            tensor = verdict["tensor"].split("[")[0]
            found = share(float(verdict["error"]), float(verdict["budget"]))
            shares[tensor] = max(shares.get(tensor, 0.0), found)
    rows: list[tuple[str, ...]] = []
    for which, shares in worst.items():
        tensor, most = max(shares.items(), key=lambda item: item[1])
        same = f"{repeated[which]}x same" if repeated[which] > 1 else "not repeated"
        bits = f"{other[which]} DIFFER" if other[which] else same
        rows.append((" ".join(which), str(counts[which]), bits, tensor, f"{most:.0%}"))
    headings = ("kind, backend, op, dtype", "cases", "bits", "worst tensor", "error / budget")
    return Sheet("Against float64, and against themselves", headings, tuple(rows))


def _tools(run: DeviceRun) -> Sheet:
    """A row for each case and kernel."""
    rows = []
    for each in run.tools:
        kernels = each.get("kernels", [])
        told = "; ".join(", ".join(f"{k} {v}" for k, v in kernel.items()) for kernel in kernels)
        clean = "nothing found" if each.get("code") == 0 else each["said"][-200:]
        finding = "FOUND SOMETHING, see below" if each["found"] else told or clean
        rows.append((each["job"], finding))
    return Sheet("compute-sanitizer and ncu", ("job", "finding"), tuple(rows), words=True)


def searched(run: DeviceRun) -> tuning.Search:
    """The configurations that were tried, as a `Search`."""
    search = tuning.Search(run.architecture, tuning.load_table())
    for name in run.tried:
        trial = space.named(name)
        search.tried.append(trial)
        if name in run.tuned:
            search.seconds.setdefault(trial.point, {})[trial] = run.tuned[name]
    return search


def tuned(search: tuning.Search, points: Sequence[space.Point]) -> Sheet:
    """Each point's configuration before, the fastest, and what was gained."""
    winners: Mapping[space.Point, space.Config] = search.winners()
    rows = []
    for point in points:
        seconds = search.seconds.get(point, {})
        own = space.current(search.table, search.architecture, point)
        before = seconds.get(space.Trial(point, own))
        chosen = winners.get(point, own)
        after = seconds.get(space.Trial(point, chosen))
        gain = f"{before / after:.2f}x" if before and after else ""
        times = [f"{1e3 * s:.3f} ms" if s else "" for s in (before, after)]
        rows.append((point.name, str(len(seconds)), str(own), str(chosen), *times, gain))
    headings = ("kernel", "timed", "before", "after", "before", "after", "gain")
    return Sheet(f"Rows, keys, warps and stages on {search.architecture}", headings, tuple(rows))


def _left_out(run: DeviceRun) -> Sheet:
    rows = []
    for family in dict.fromkeys(run.left_out.values()):
        names = [name for name, of in run.left_out.items() if of == family]
        why = " / ".join(run.crashes[family])
        rows.append((family, f"{len(names)} jobs, from {names[0]} on", why))
    title = f"LEFT OUT: crashed or hung {CRASHES} times"
    return Sheet(title, ("kernels", "left out", "why"), tuple(rows), words=True)


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

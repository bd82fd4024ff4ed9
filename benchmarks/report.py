"""Tables of a run, for a terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.compare import LEAST, Change, slower
from benchmarks.runner import MemoryPoint, Run
from resformer_kernels.bench.tables import duration, speed_table
from resformer_kernels.bench.timing import OURS


def print_run(run: Run, console: Console) -> None:
    """Every table of the run."""
    described = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    console.print(f"[bold]{described}", soft_wrap=True)
    rates = ", ".join(f"GEMM {name} {rate / 1e9:.0f} GFLOP/s" for name, rate in run.gemm.items())
    speeds = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in run.bandwidth.items())
    console.print(f"ceilings measured in this run: {rates}, {speeds}")
    if run.compared:
        samples = len(run.compared[0].ours.samples)
        console.print(
            f"medians of {samples} alternating samples; mixing is inside ours and the peer's; the "
            "peer is the fastest that is here"
        )
        rates_and_speeds = (run.gemm, run.bandwidth.get("copy"), run.bandwidth.get("read"))
        console.print(speed_table(run.compared, *rates_and_speeds))
        console.print(peer_table(run))
    for table in (window_table(run), memory_table(run.memory), absent_table(run)):
        if table.row_count:
            console.print(table)
    if run.errors:
        worst = max(run.errors, key=lambda verdict: verdict.share)
        console.print(
            f"against float64: {len(run.errors)} tensors, {sum(not v.ok for v in run.errors)} over "
            f"budget; the nearest to it is {worst.op} {worst.tensor} in {worst.dtype}, at "
            f"{worst.share:.0%}"
        )
    console.print(pages_line(run), soft_wrap=True)


def ceilings(run: Run) -> tuple[dict[str, float], float | None, float | None]:
    """GEMM's rates by dtype, and the bandwidths of copying and reading."""
    return run.gemm, run.bandwidth.get("copy"), run.bandwidth.get("read")


def peer_table(run: Run) -> Table:
    """Every peer over all of its cases."""
    table = Table(header_style="bold", title="How many times faster", title_justify="left")
    table.add_column("op")
    table.add_column("than")
    for heading in ("cases", "least", "median", "most"):
        table.add_column(heading, justify="right", no_wrap=True)
    found: dict[tuple[str, str], list[float]] = {}
    for result in run.compared:
        for peer in result.peers:
            ratio = result.timings[peer].median / result.ours.median
            found.setdefault((result.group, peer), []).append(ratio)
    for (group, peer), ratios in found.items():
        cells = (min(ratios), statistics.median(ratios), max(ratios))
        table.add_row(group, peer, str(len(ratios)), *(f"{cell:.2f}x" for cell in cells))
    return table


def absent_table(run: Run) -> Table:
    """Peers that did not take part, and why."""
    table = Table(header_style="bold", title="Not here", title_justify="left")
    table.add_column("peer", no_wrap=True)
    table.add_column("why", overflow="fold")
    table.add_column("cases", justify="right", no_wrap=True)
    for (peer, reason), cases in absent(run).items():
        table.add_row(peer, reason, str(cases))
    return table


def absent(run: Run) -> dict[tuple[str, str], int]:
    """Cases that a peer took no part in, by peer and reason; ours, where nobody did."""
    found: dict[tuple[str, str], int] = {}
    for reason in run.left_out.values():
        found[OURS, reason] = found.get((OURS, reason), 0) + 1
    for result in run.results:
        for key in result.absent.items():
            found[key] = found.get(key, 0) + 1
    return found


def print_changes(changes: Sequence[Change], console: Console) -> None:
    """What `--compare` found, slower cases first."""
    found = slower(changes)
    table = Table(header_style="bold", title="Slower than stored", title_justify="left")
    table.add_column("case", overflow="fold")
    for heading in ("stored", "now", "times longer", "its yardstick"):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in found:
        times = (duration(change.before), duration(change.after))
        longer = f"[red]{change.times_longer:.2f}x"
        table.add_row(change.name, *times, longer, f"{change.drift:.2f}x")
    if found:
        console.print(table)
    ratios = [change.times_longer for change in changes]
    console.print(
        f"{len(changes)} cases are in the stored run too: {len(found)} slower by more than the "
        f"spread of both and {LEAST:.0%}; the median case takes {statistics.median(ratios):.2f}x "
        "as long"
    )


def pages_line(run: Run) -> str:
    """Which samples time fresh pages too, and not the call alone."""
    disturbed = [
        f"{result.name}, {name}: {timing.disturbed} of {len(timing.samples)} samples"
        for result in run.results
        for name, timing in result.timings.items()
        if timing.disturbed
    ]
    kept = "is kept" if run.freed_memory_kept else "goes back to the system"
    return f"freed memory {kept}; fresh pages touched in " + ("; ".join(disturbed) or "no sample")


def window_table(run: Run) -> Table:
    """What a window costs beside full causal attention, and beside the pairs it keeps."""
    table = Table(header_style="bold", title="A window, against no window", title_justify="left")
    table.add_column("case", overflow="fold")
    for heading in ("share of pairs", "share of time", "time / pairs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in run.results:
        if result.name in run.window_shares:
            pairs, cost = run.window_shares[result.name], 1 / result.ratio
            table.add_row(result.name, f"{pairs:.1%}", f"{cost:.1%}", f"{cost / pairs:.2f}")
    return table


def memory_table(points: Sequence[MemoryPoint]) -> Table:
    """Peak memory over the length; an exponent of 1 is linear."""
    table = Table(
        header_style="bold",
        title="Peak memory of forward + backward beyond the inputs (learnable λ)",
        title_justify="left",
    )
    for heading in ("contestant", "dtype", "T", "MiB", "bytes a token", "exponent"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous: MemoryPoint | None = None
    for point in points:
        growth = ""
        if previous is not None and _line(previous) == _line(point):
            growth = f"{exponent(previous, point):.2f}"
        table.add_row(
            point.contestant,
            point.dtype,
            str(point.length),
            f"{point.bytes / 2**20:.1f}",
            f"{point.bytes / point.length:.0f}",
            growth,
        )
        previous = point
    return table


def _line(point: MemoryPoint) -> tuple[str, str]:
    return point.contestant, point.dtype


def exponent(small: MemoryPoint, large: MemoryPoint) -> float:
    """p where memory grows as T to the p between two points."""
    return math.log(large.bytes / small.bytes) / math.log(large.length / small.length)

"""Tables of a run, for a terminal."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.compare import LEAST, Change, slower
from benchmarks.runner import MemoryPoint, Run
from resformer_kernels.bench.tables import blank_table, duration, speed_table
from resformer_kernels.bench.timing import OURS


def print_run(run: Run, console: Console) -> None:
    """Print every table of the run."""
    described = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    console.print(f"[bold]{described}", soft_wrap=True)
    rates = ", ".join(f"GEMM {name} {rate / 1e9:.0f} GFLOP/s" for name, rate in run.gemm.items())
    speeds = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in run.bandwidth.items())
    console.print(f"ceilings measured in this run: {rates}, {speeds}")
    if run.compared:
        samples = len(run.compared[0].ours.samples)
        console.print(
            f"medians of {samples} alternating samples, which include mixing, ours and the peer's; "
            "the peer is the fastest one here"
        )
        console.print(speed_table(run.compared, *ceilings(run)))
        console.print(peer_table(run))
    for found in (window_table(run), memory_table(run.memory), absent_table(run)):
        if found.row_count:
            console.print(found)
    if run.errors:
        worst = max(run.errors, key=lambda verdict: verdict.share)
        console.print(
            f"against float64: {len(run.errors)} tensors, {sum(not v.ok for v in run.errors)} over "
            f"budget; the worst is {worst.op} {worst.tensor} in {worst.dtype}, at "
            f"{worst.share:.0%}"
        )
    console.print(pages_line(run), soft_wrap=True)


def ceilings(run: Run) -> tuple[dict[str, float], float | None, float | None]:
    """GEMM's rates by dtype, and the bandwidths of copying and reading."""
    return run.gemm, run.bandwidth.get("copy"), run.bandwidth.get("read")


def peer_table(run: Run) -> Table:
    """Every peer over all of its cases."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for result in run.compared:
        for peer in result.peers:
            ratio = result.timings[peer].median / result.ours.median
            ratios.setdefault((result.group, peer), []).append(ratio)
    found = blank_table(
        ["op", "than"], ["cases", "least", "median", "most"], "How many times faster"
    )
    for names, over in ratios.items():
        cells = (f"{of(over):.2f}x" for of in (min, statistics.median, max))
        found.add_row(*names, str(len(over)), *cells)
    return found


def absent_table(run: Run) -> Table:
    """Peers that were not timed, and why."""
    found = blank_table(["peer", "why"], ["cases"], "Not measured")
    for names, cases in absent(run).items():
        found.add_row(*names, str(cases))
    return found


def absent(run: Run) -> Counter[tuple[str, str]]:
    """How many cases a peer is missing from, by peer and reason; ours, for cases left out."""
    found = Counter((OURS, reason) for reason in run.left_out.values())
    for result in run.results:
        found.update(result.absent.items())
    return found


def print_changes(changes: Sequence[Change], console: Console) -> None:
    """Print what `--compare` found: the slower cases, and the median of all."""
    numbers = ["stored", "now", "times longer", "its yardstick"]
    found = blank_table(["case"], numbers, "Slower than stored")
    for change in slower(changes):
        times = (duration(change.before), duration(change.after))
        longer = f"[red]{change.times_longer:.2f}x"
        found.add_row(change.name, *times, longer, f"{change.drift:.2f}x")
    if found.row_count:
        console.print(found)
    median = statistics.median(change.times_longer for change in changes)
    console.print(
        f"{len(changes)} cases are in the stored run too: {found.row_count} slower by more than "
        f"the spread of both and {LEAST:.0%}; the median case takes {median:.2f}x as long"
    )


def pages_line(run: Run) -> str:
    """The samples that include the mapping of fresh pages."""
    disturbed = [
        f"{result.name}, {name}: {timing.disturbed} of {len(timing.samples)} samples"
        for result in run.results
        for name, timing in result.timings.items()
        if timing.disturbed
    ]
    kept = "is kept" if run.freed_memory_kept else "goes back to the system"
    return f"freed memory {kept}; fresh pages touched in " + ("; ".join(disturbed) or "no sample")


def window_table(run: Run) -> Table:
    """The time of a window as a share of full causal attention's, beside its share of pairs."""
    numbers = ["share of pairs", "share of time", "time / pairs"]
    found = blank_table(["case"], numbers, "A window, against no window")
    for result in run.results:
        if result.name in run.window_shares:
            pairs, cost = run.window_shares[result.name], 1 / result.ratio
            found.add_row(result.name, f"{pairs:.1%}", f"{cost:.1%}", f"{cost / pairs:.2f}")
    return found


def memory_table(points: Sequence[MemoryPoint]) -> Table:
    """Peak memory over the length; an exponent of 1 is linear."""
    found = blank_table(
        [],
        ["contestant", "dtype", "T", "MiB", "bytes a token", "exponent"],
        "Peak memory of forward + backward beyond the inputs (learnable λ)",
    )
    before: dict[tuple[str, str], MemoryPoint] = {}
    for point in points:
        line = (point.contestant, point.dtype)
        found.add_row(
            *line,
            str(point.length),
            f"{point.bytes / 2**20:.1f}",
            f"{point.bytes / point.length:.0f}",
            f"{exponent(before[line], point):.2f}" if line in before else "",
        )
        before[line] = point
    return found


def exponent(small: MemoryPoint, large: MemoryPoint) -> float:
    """p, where memory grows as T to the power p between two points."""
    return math.log(large.bytes / small.bytes) / math.log(large.length / small.length)

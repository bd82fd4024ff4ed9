"""Tables of a run, and its JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.runner import MemoryPoint, Run
from resformer_kernels.cli.tables import speed_table
from resformer_kernels.testing import machine

RESULTS = Path(__file__).parent / "results"


def print_run(run: Run, console: Console) -> None:
    """Every table of the run."""
    described = ", ".join(f"{name} {value}" for name, value in run.machine.items())
    console.print(f"[bold]{described}", soft_wrap=True)
    rates = ", ".join(f"GEMM {name} {rate / 1e9:.0f} GFLOP/s" for name, rate in run.gemm.items())
    speeds = ", ".join(f"{name} {rate / 1e9:.1f} GB/s" for name, rate in run.bandwidth.items())
    console.print(f"ceilings measured in this run: {rates}, {speeds}")
    compared = [r for r in run.results if r.name not in run.window_shares]
    if compared:
        samples = len(compared[0].ours.samples)
        console.print(
            f"medians of {samples} alternating samples; mixing is inside ours and the peer's; the "
            "peer is the fastest of its forms"
        )
        console.print(
            speed_table(compared, run.gemm, run.bandwidth.get("copy"), run.bandwidth.get("read"))
        )
    console.print(pages_line(run), soft_wrap=True)
    if run.window_shares:
        console.print(window_table(run))
    if run.memory:
        console.print(memory_table(run.memory))


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


def memory_table(points: list[MemoryPoint]) -> Table:
    """Peak memory over the length; an exponent of 1 is linear."""
    table = Table(
        header_style="bold",
        title="Peak memory of forward + backward beyond the inputs (learnable λ)",
        title_justify="left",
    )
    for heading in ("dtype", "T", "MiB", "bytes a token", "exponent"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous: MemoryPoint | None = None
    for point in points:
        growth = ""
        if previous is not None and previous.dtype == point.dtype:
            growth = f"{exponent(previous, point):.2f}"
        table.add_row(
            point.dtype,
            str(point.length),
            f"{point.bytes / 2**20:.1f}",
            f"{point.bytes / point.length:.0f}",
            growth,
        )
        previous = point
    return table


def exponent(small: MemoryPoint, large: MemoryPoint) -> float:
    """p where memory grows as T to the p between two points."""
    return math.log(large.bytes / small.bytes) / math.log(large.length / small.length)


def store(run: Run, path: Path | None = None) -> Path:
    """Write the run's JSON, by default to benchmarks/results/<machine>.json; the path."""
    path = path or RESULTS / f"{machine.slug()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run.as_json(), indent=1, default=str) + "\n")
    return path

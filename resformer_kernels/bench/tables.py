"""Tables that more than one command prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from resformer_kernels.bench.timing import OURS, Result


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for scale, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * scale >= 1.0 or unit == "µs":
            return f"{seconds * scale:.3g} {unit}"
    raise AssertionError("unreachable: µs takes everything")


def speed_table(
    results: Sequence[Result],
    gemm: Mapping[str, float],
    copy_bandwidth: float | None = None,
    read_bandwidth: float | None = None,
) -> Table:
    """Ours beside the fastest peer of each case, and our share of the ceiling measured beside.

    Args:
        results: what was timed.
        gemm: FLOP/s of a matrix product, by dtype.
        copy_bandwidth: bytes a second, the ceiling of cases without FLOPs.
        read_bandwidth: bytes a second, the ceiling of decoding, which only reads.
    """
    table = Table(header_style="bold")
    table.add_column("case", overflow="fold")
    remembered = any(result.peak_bytes for result in results)
    headings = ("ours", "peer", "ratio", "ours, rate", "ceiling")
    for heading in (*headings, *(("MiB, peer's",) if remembered else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("fastest peer", no_wrap=True)
    group = ""
    for result in results:
        if group and result.group != group:
            table.add_section()
        group = result.group
        rate, share = rate_and_share(result, gemm, copy_bandwidth, read_bandwidth)
        colour = "green" if result.ratio >= 1 else "yellow"
        table.add_row(
            result.name,
            duration(result.ours.median),
            duration(result.timings[result.peer].median),
            f"[{colour}]{result.ratio:.2f}x",
            rate,
            share,
            *((_memory(result),) if remembered else ()),
            result.peer,
        )
    return table


def _memory(result: Result) -> str:
    """MiB that one call takes: ours, and its fastest peer's."""
    cells = [result.peak_bytes.get(name) for name in (OURS, result.peer)]
    return ", ".join("" if found is None else f"{found / 2**20:.1f}" for found in cells)


def rate_and_share(
    result: Result,
    gemm: Mapping[str, float],
    copy_bandwidth: float | None,
    read_bandwidth: float | None = None,
) -> tuple[str, str]:
    """Our rate with its unit, and its share of the ceiling with the ceiling's name."""
    if result.flops:
        rate = result.flops / result.ours.median
        ceiling = gemm.get(result.dtype)
        return f"{rate / 1e9:.0f} GFLOP/s", f"{rate / ceiling:.0%} of GEMM" if ceiling else ""
    rate = result.bytes / result.ours.median
    if result.group.startswith("decode"):
        share = f"{rate / read_bandwidth:.0%} of read" if read_bandwidth else ""
    else:
        share = f"{rate / copy_bandwidth:.0%} of copy" if copy_bandwidth else ""
    return f"{rate / 1e9:.1f} GB/s", share

"""Tables that more than one command prints, and the format of their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from resformer_kernels.bench.timing import OURS, Result


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for scale, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * scale >= 1.0:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def table(words: Iterable[str], numbers: Iterable[str], title: str | None = None) -> Table:
    """An empty table: columns of words, which fold, then columns of numbers, flush right."""
    empty = Table(header_style="bold", title=title, title_justify="left")
    for heading in words:
        empty.add_column(heading, overflow="fold")
    for heading in numbers:
        empty.add_column(heading, justify="right", no_wrap=True)
    return empty


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
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
    found = table(["case"], ["ours", "peer", "ratio", "ours, rate", "ceiling", *memory])
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

"""The figures of a report, as far as its runs have the data for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks import curves, plots
from benchmarks.peak_memory import SDPA
from benchmarks.plots import ONE_VALUE, Curve, as_svg, count, doublings, look, sizes
from benchmarks.runner import Run
from benchmarks.workloads.decode import OWN_VALUES
from benchmarks.workloads.scan import COPY
from resformer_kernels.bench.attention import HEADS_FIRST
from resformer_kernels.bench.tables import duration
from resformer_kernels.bench.timing import Benchmark, Result
from resformer_kernels.testing.verification import Verdict

_ROWS = 16
"""The most in one panel of bars."""


@dataclass(frozen=True)
class Drawing:
    """A figure with its words."""

    name: str
    """The name of its file too."""
    section: str
    title: str
    caption: str
    svg: str
    """Empty where there is no data for it."""


class Cases:
    """The newest result of every case, with its run."""

    def __init__(self, runs: Sequence[Run]) -> None:
        newest = sorted(runs, key=lambda run: run.started)
        self.found = {result.name: (result, run) for run in newest for result in run.results}
        points = (point for run in newest for point in run.memory)
        self.memory = {(point.contestant, point.length): point.bytes for point in points}
        self.errors: list[Verdict] = []
        for run in reversed(newest):
            known = {verdict.op for verdict in self.errors}
            self.errors += [verdict for verdict in run.errors if verdict.op not in known]

    def of(self, cases: Iterable[Benchmark], *names: str) -> list[tuple[Result, Run]]:
        """The measured ones of these cases, and of the cases of these names."""
        wanted = (*(case.name for case in cases), *names)
        return [self.found[name] for name in wanted if name in self.found]

    def group(self, group: str, *, yardstick: bool | None = False) -> list[Result]:
        """The results under this heading that have a peer, without the points of curves.

        Args:
            group: the heading.
            yardstick: True: only those whose fastest peer is a yardstick, which is a copy or our
                own kernel used otherwise. False: only those compared with somebody else's work.
                None: all.
        """
        drawn = {case.name for case in curves.every()}
        return [
            result
            for name, (result, _) in self.found.items()
            if result.group == group
            and name not in drawn
            and result.peers
            and yardstick in (None, result.peer in (COPY, OWN_VALUES))
        ]


def draw(runs: Sequence[Run]) -> list[Drawing]:
    """Every figure that these runs have the data for, in the order of the page."""
    cases = Cases(runs)
    kinds = (_speed, _length, _memory, _decode, _scan, _reservoir, _errors)
    return [drawing for kind in kinds for drawing in kind(cases) if drawing.svg]


_SPEED = (
    ("attention-forward", "Attention, forward", "attention forward", False),
    ("attention-backward", "Attention, backward", "attention backward", False),
    ("decode", "Decoding, 12 layers", "decode", False),
    ("decode-shared", "Decoding, one V for all layers", "decode", True),
    ("decode-models", "Decoding with whole models of transformers", "decode in transformers", None),
    ("mix", "Mixing alone", "mix", False),
    ("reservoir", "Reservoirs", "reservoir", False),
    ("scan", "Linear scan", "scan", False),
    ("scan-copy", "Linear scan beside a copy", "scan", True),
)
"""Name, title, group, whether beside a yardstick (None: both)."""
_BESIDE_PEERS = "Time of each peer as a multiple of ours; the bar and its number are the fastest's."
_BESIDE_YARDSTICKS = {
    "decode-shared": "Time of our own kernel with a V in each layer, as a multiple of one V's.",
    "scan-copy": "Time of a plain copy of as many bytes to pages in use, as a multiple of ours.",
}


def _speed(cases: Cases) -> Iterator[Drawing]:
    for name, title, group, yardstick in _SPEED:
        results = cases.group(group, yardstick=yardstick)[:_ROWS]
        height = 0.9 + 0.34 * len(results)
        svg = as_svg(height, partial(plots.bars, results=results)) if results else ""
        caption = _BESIDE_YARDSTICKS.get(name, _BESIDE_PEERS)
        yield Drawing(f"speed-{name}", "Speed beside every peer", title, caption, svg)


def _lines(height: float, curve: Curve, **form: Any) -> str:
    """The SVG of `plots.lines`, which takes `form`; empty where no line has two points."""
    if all(len(points) < 2 for points in curve.values()):
        return ""
    return as_svg(height, partial(plots.lines, curve=curve, **form))


def _best(
    found: Iterable[tuple[Result, Run]],
    x: str,
    y: Callable[[Result, str], float | None],
    pick: Callable[[float, float], float] = min,
) -> Curve:
    """`y` over one size of the cases; `pick` chooses among contestants that look the same.

    `y(result, contestant)` is None, or 0, where nothing was measured.
    """
    curve: Curve = {}
    for result, _ in found:
        place = sizes(result.name)[x]
        for contestant in result.timings:
            if value := y(result, contestant):
                line = curve.setdefault(look(contestant), {})
                line[place] = pick(value, line.get(place, value))
    return curve


def _rate(result: Result, contestant: str) -> float:
    return result.bytes / result.timings[contestant].median


def _bandwidth(found: Iterable[tuple[Result, Run]], kind: str) -> float:
    return max((run.bandwidth.get(kind, 0.0) for _, run in found), default=0.0)


def _mib(value: float) -> str:
    size = value / 2**20
    return f"{size / 1024:g} GiB" if size >= 1024 else f"{size:.3g} MiB"


def _gigabytes(value: float) -> str:
    return f"{value / 1e9:g}"


_LENGTH = "Time and memory over the length"
_MEMORY_FORM: dict[str, Any] = {"xlabel": "length T", "form": _mib, "ticks": doublings}


def _length(cases: Cases) -> Iterator[Drawing]:
    caption = f"B1 H{curves.HEADS} D{curves.HEAD_DIM}, causal, bfloat16. Mixing included."
    for direction in ("forward", "backward"):
        found = cases.of(case for case in curves.attention() if case.group.endswith(direction))
        times = _best(found, "T", lambda result, name: result.timings[name].median)
        svg = _lines(3.5, times, xlabel="length T", form=duration)
        yield Drawing(f"length-time-{direction}", _LENGTH, f"Time, {direction}", caption, svg)
        title = f"Memory that a call takes, {direction}"
        peaks = _best(found, "T", lambda result, name: result.peak_bytes.get(name))
        svg = _lines(3.5, peaks, **_MEMORY_FORM)
        if direction == "backward":
            caption += " What the forward saved for it is there before the call, and not counted."
        yield Drawing(f"length-memory-{direction}", _LENGTH, title, caption, svg)


def _memory(cases: Cases) -> Iterator[Drawing]:
    curve: Curve = {}
    for (contestant, length), size in cases.memory.items():
        curve.setdefault(look(HEADS_FIRST if contestant == SDPA else contestant), {})[length] = size
    caption = (
        "Peak of forward and backward beyond the inputs: output, gradients and what is saved "
        "in between. Two heads of 64, bfloat16, a fresh process each."
    )
    svg = _lines(3.5, curve, **_MEMORY_FORM)
    yield Drawing("memory-training", _LENGTH, "Memory, forward and backward", caption, svg)


def _decode(cases: Cases) -> Iterator[Drawing]:
    for group in curves.DECODE_GROUPS:
        grid = [c for c in curves.decode_grid() if c.batch == 1 and c.heads == group * c.kv_heads]
        # One V counts as often as it is attended over, which is once in each layer.
        attended = {case.length: case.bytes for case in grid if not case.shared}
        own = cases.of(case for case in grid if not case.shared)
        curve = _best(own, "T", _rate, max)
        shared = cases.of(case for case in grid if case.shared)
        for result, _ in shared:
            length = sizes(result.name)["T"]
            curve.setdefault(ONE_VALUE, {})[length] = attended[length] / result.ours.median
        per = "one query head" if group == 1 else f"{group} query heads"
        caption = (
            f"One token through 12 layers, B1 Hkv{curves.KV_HEADS} D{curves.HEAD_DIM}, "
            "bfloat16. The rate counts the keys and values attended over: one V for all layers "
            "(SVFormer) counts in each, though memory holds it once, so it may pass the ceiling."
        )
        svg = _lines(
            3.7,
            curve,
            xlabel="tokens in the cache",
            ylabel="GB/s of keys and values",
            form=_gigabytes,
            ceiling=("bandwidth of reading", _bandwidth([*own, *shared], "read")),
        )
        title = f"Decoding, {per} a KV head"
        yield Drawing(f"decode-group{group}", "Decoding over the context", title, caption, svg)


_SCANS = "Scans and reservoirs"


def _scan(cases: Cases) -> Iterator[Drawing]:
    found = cases.of(curves.scan(), "linear_scan forward B1 T8192 N1024 gates by step float32")
    for x, fixed, at, xlabel in (("T", "N", 1024, "length T"), ("N", "T", 8192, "channels N")):
        chosen = [(result, run) for result, run in found if sizes(result.name)[fixed] == at]
        pages = (
            "States are written to pages that are mapped already."
            if all(run.freed_memory_kept for _, run in chosen)
            else "States beyond 32 MiB are written to fresh pages at every call, and the time "
            "that the system takes to map them counts."
        )
        caption = f"Forward, B1 {fixed}{count(at)}, gates by step, float32. {pages}"
        svg = _lines(
            3.6,
            _best(chosen, x, _rate, max),
            xlabel=xlabel,
            ylabel="GB/s of gates, tokens and states",
            form=_gigabytes,
            ceiling=("bandwidth of a copy", _bandwidth(chosen, "copy")),
        )
        title = f"Linear scan over {xlabel}"
        yield Drawing(f"scan-{x.lower()}", _SCANS, title, caption, svg)


def _reservoir(cases: Cases) -> Iterator[Drawing]:
    found = cases.of(curves.reservoir(), "reservoir_scan dense B1 T16384 N256 float32")
    length, units = curves.RESERVOIR_LENGTH, curves.RESERVOIR_UNITS
    for x, fixed, at, xlabel in (("N", "T", length, "units N"), ("T", "N", units, "steps T")):
        chosen = [(result, run) for result, run in found if sizes(result.name)[fixed] == at]
        caption = (
            f"Dense float32 weights, B1 {fixed}{count(at)}, leak 0.3, spectral radius 0.9; "
            "ReservoirPy with its default, a tenth of the weights."
        )
        curve = _best(chosen, x, lambda r, name: r.timings[name].median / sizes(r.name)["T"])
        svg = _lines(3.6, curve, xlabel=xlabel, ylabel="time a step", form=duration)
        title = f"Reservoir over {xlabel}"
        yield Drawing(f"reservoir-{x.lower()}", _SCANS, title, caption, svg)


def _errors(cases: Cases) -> Iterator[Drawing]:
    if cases.errors:
        caption = (
            "Every tensor, forward and backward. The budget is twice the error of plain PyTorch in "
            "the same precision, plus one rounding of the terms summed; the left edge is a "
            "thousandth of it or less."
        )
        height = 1.1 + 0.42 * len({verdict.op for verdict in cases.errors})
        svg = as_svg(height, partial(plots.errors, verdicts=cases.errors))
        yield Drawing("errors", "Errors", "Error against float64", caption, svg)

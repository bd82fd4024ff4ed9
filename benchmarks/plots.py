"""How figures look, and the kinds of plot: lines, bars, errors.

One palette serves light and dark, and colour-blind readers can tell its colours apart. Figures are
drawn in stand-in colours, which `as_svg` replaces by CSS variables; the page, or the file's own
style, gives each variable its value by the reader's colour scheme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Locator, LogLocator, NullLocator

from benchmarks.workloads import attention, common, decode, device, mix, model, reservoir, scan
from resformer_kernels.bench.attention import SDPA
from resformer_kernels.bench.timing import OURS, Result
from resformer_kernels.testing.verification import Verdict

WIDTH = 5.2
"""Inches. A panel this wide is readable on a telephone, and two fit side by side."""

_STYLE = Path(__file__).parent / "figures.mplstyle"
_LABELS = re.compile(r"\b(B|Hq|Hkv|H|T|N|D)(\d+)\b")
_LEGEND_CHARACTERS = 74
"""Width of a legend, where each handle counts as six characters."""

# Okabe and Ito's colours, lighter on dark ground.
PALETTE = {
    "card": ("#ffffff", "#171c24"),
    "ink": ("#1b2430", "#e6e9ee"),
    "muted": ("#5f6b7a", "#9aa5b4"),
    "grid": ("#e3e7ec", "#2b333f"),
    "ours": ("#0072b2", "#56b4f0"),
    "orange": ("#d55e00", "#ff8f4d"),
    "green": ("#00795a", "#2fc79b"),
    "purple": ("#a8478a", "#e39bcb"),
    "yellow": ("#b07d00", "#f0c24b"),
    "bad": ("#b3261e", "#ff7b72"),
}
"""Light, dark."""
COLOUR = {name: f"#0000{10 + place:02x}" for place, name in enumerate(PALETTE)}
"""The stand-in for each colour of `PALETTE`; figures.mplstyle uses them too."""
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


class Look(NamedTuple):
    """How a contestant is drawn everywhere."""

    label: str
    colour: str
    marker: str = "o"
    dashes: str = "-"

    def line(self, **more: Any) -> dict[str, Any]:
        """The arguments of `Axes.plot` for a line."""
        colour = COLOUR[self.colour]
        about = {"color": colour, "marker": self.marker, "label": self.label}
        return {**about, "linestyle": self.dashes, **more}

    def dots(self, size: float, **more: Any) -> dict[str, Any]:
        """The arguments of `Axes.plot` for points that no line connects."""
        return self.line(linestyle="none", markersize=size, markeredgewidth=0, **more)


Curve: TypeAlias = dict[Look, dict[float, float]]
"""The lines of a plot: y by x, by the look of the line."""

ONE_VALUE = Look("ours, one V for all layers", "green", "^")
"""Our decoding of an SVFormer, drawn beside decoding with a V in each layer."""
_LOOKS = {
    OURS: Look("resformer_kernels", "ours"),
    **dict.fromkeys(SDPA, Look("torch SDPA", "orange", "s")),
    attention.MATH: Look("torch SDPA, math", "muted", "D", "--"),
    common.COMPILED: Look("torch.compile", "green", "^"),
    device.FLEX: Look("FlexAttention", "purple", "v"),
    attention.X_TRANSFORMERS: Look("x-transformers", "yellow", "P"),
    common.FLASH_ATTN: Look("flash-attn", "ink", "<"),
    device.FA3: Look("FlashAttention 3", "ink", ">"),
    **dict.fromkeys(
        (decode.GQA, decode.GQA + decode.TIME_FIRST), Look("SDPA, enable_gqa", "muted", "D", "--")
    ),
    **dict.fromkeys(
        (decode.FOLDED, decode.FOLDED + decode.TIME_FIRST),
        Look("SDPA, group folded", "orange", "s"),
    ),
    decode.OWN_VALUES: Look("ours, a V in each layer", "green", "^"),
    model.DYNAMIC: Look("sdpa, DynamicCache", "muted", "D", "--"),
    model.STATIC: Look("sdpa, StaticCache", "orange", "s"),
    scan.LOOP: Look("Python loop", "muted", "D", "--"),
    scan.ASSOCIATIVE: Look("torch associative_scan", "orange", "s"),
    scan.COPY: Look("a copy of as many bytes", "green", "^"),
    scan.FLA: Look(scan.FLA, "purple", "v"),
    scan.ACCELERATED: Look(scan.ACCELERATED, "yellow", "P"),
    reservoir.LOOP: Look("torch loop", "orange", "s"),
    reservoir.LOOP_CSR: Look(reservoir.LOOP_CSR, "orange", "D"),
    reservoir.JAX: Look(reservoir.JAX, "ink", "<"),
    reservoir.RESDAG: Look(reservoir.RESDAG, "yellow", "P"),
    reservoir.RNN: Look("torch.nn.RNN", "green", "^"),
    reservoir.RESERVOIRPY: Look("ReservoirPy", "purple", "v"),
    "sum of products": Look("sum of products", "orange", "s"),
    "stack and einsum": Look("stack and einsum", "ink", "<"),
    mix.STACKED: Look(mix.STACKED, "ink", ">"),
    "addcmul": Look("addcmul", "muted", "D"),
    "indexing": Look("indexing", "yellow", "P"),
    "F.embedding": Look("F.embedding", "purple", "v"),
}


def look(contestant: str) -> Look:
    """The look of a contestant; an unknown one is grey, under its own name."""
    return _LOOKS.get(contestant, Look(contestant, "muted", "X"))


def as_svg(height: float, draw: Callable[[Axes], None]) -> str:
    """The SVG of what `draw` draws, its legend above it, in CSS variables and without an XML head.

    `height` is in inches.
    """
    with matplotlib.rc_context(fname=_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=COLOUR["card"])
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        _legend(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, stand_in in COLOUR.items():
        text = text.replace(stand_in, f"var(--{name})")
    # The page chooses the size; the view box keeps the proportions.
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)


def variables(scheme: int) -> str:
    """The CSS variables of the light (0) or the dark (1) scheme."""
    return " ".join(f"--{name}: {values[scheme]};" for name, values in PALETTE.items())


def alone(svg: str) -> str:
    """The SVG as a file of its own, which follows the reader's colour scheme."""
    style = (
        f"<style>:root {{ {variables(0)} }} "
        f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(1)} }} }} "
        f"text {{ font-family: {FONT} !important; }}</style>"
    )
    head, tail = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>{style}{tail}'


def count(value: float) -> str:
    """1k is 1024, as for lengths; decimal where the value is no multiple of it."""
    for factor, unit in ((2**20, "M"), (2**10, "k")):
        if value >= factor and value % factor == 0:
            return f"{value / factor:.0f}{unit}"
    return f"{value:.0f}"


def decades(axis: Axis, form: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis, written by `form`; between decades where there are few."""
    low, high = sorted(axis.get_view_interval())
    subs = (1.0,) if high / low > 200 else (1.0, 3.0) if high / low > 12 else (1.0, 2.0, 5.0)
    _ticks(axis, LogLocator(subs=subs, numticks=12), form)


def doublings(axis: Axis, form: Callable[[float], str]) -> None:
    """The same for bytes: powers of two, as many as fit."""
    low, high = sorted(axis.get_view_interval())
    step = max(1, round(math.log2(high / low) / 5))
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    _ticks(axis, FixedLocator([2.0**power for power in powers if power % step == 0]), form)


def _ticks(axis: Axis, locator: Locator, form: Callable[[float], str]) -> None:
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: form(value))


def _legend(axes: Axes) -> None:
    """The legend above the axes, each label once, ours first; as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    ours = look(OURS).label
    unique = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0] != ours))
    fitting = _LEGEND_CHARACTERS // (max(map(len, unique)) + 6)
    columns = max(1, min(len(unique), fitting))
    axes.figure.legend(unique.values(), unique.keys(), loc="outside upper left", ncols=columns)


_LEAST_SHARE = 1e-3
"""Smaller errors are drawn here, at the left edge."""
_DTYPE_LOOKS = [
    Look("float32", "ours"),
    Look("bfloat16", "orange", "s"),
    Look("float16", "green", "^"),
]
_DTYPES = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "complex64": "c64"}
_MARKS = {
    "mix_value_embedding": "embedding",
    "of 2 ": "2 sources",
    "of 8 ": "8 sources",
    "one V": "one V",
    "(B,H,T,D)": "heads first",
    "nn.Reservoir": "module",
    "Llama": "Llama",
    "SVFormer": "SVFormer",
    "sparse": "sparse",
    "constant gates": "constant gates",
    " backward ": "backward",
}
"""What distinguishes the cases of one panel, by a part of their names."""


def lines(
    axes: Axes,
    curve: Curve,
    *,
    xlabel: str,
    form: Callable[[float], str],
    ylabel: str = "",
    ticks: Callable[[Axis, Callable[[float], str]], None] = decades,
    ceiling: tuple[str, float] | None = None,
) -> None:
    """Lines on logarithmic axes, ours on top; a ceiling (its name, its height) is a dashed rule."""
    ours = look(OURS)
    for style in sorted(curve, key=lambda style: style == ours):
        axes.plot(
            *zip(*sorted(curve[style].items()), strict=True),
            **style.line(linewidth=2.4 if style == ours else 1.6),
        )
    # A tick at each measured size.
    places = sorted({x for points in curve.values() for x in points})
    axes.set_xscale("log", base=2)
    _ticks(axes.xaxis, FixedLocator(places), count)
    axes.set_xlim(places[0] / 1.25, places[-1] * 1.25)
    axes.set_yscale("log")
    if ceiling is not None:
        # Named in the legend: a name beside the rule would lie on one of the lines.
        label, value = ceiling
        axes.axhline(value, color=COLOUR["ink"], linewidth=1.0, linestyle=(0, (5, 3)), label=label)
        low, high = axes.get_ylim()
        axes.set_ylim(low, max(high, 1.5 * value))
    ticks(axes.yaxis, form)
    axes.grid()
    axes.set(xlabel=xlabel, ylabel=ylabel)


def bars(axes: Axes, results: Sequence[Result]) -> None:
    """Every peer's time as a multiple of ours, a row for each case; the bar is the fastest's."""
    most = 2.0
    for y, result in enumerate(results):
        low, high = sorted((1.0, result.ratio))
        colour = COLOUR["ours" if result.ratio >= 1.0 else "bad"]
        axes.barh(y, high - low, 0.62, left=low, color=colour, alpha=0.28)
        # Peers come fastest first: of several forms of one peer, that one is drawn.
        shown: dict[Look, str] = {}
        for peer in result.peers:
            shown.setdefault(look(peer), peer)
        for style, peer in shown.items():
            ratio = result.timings[peer].median / result.ours.median
            most = max(most, ratio)
            axes.plot(ratio, y, **style.dots(6))
    axes.axvline(1.0, color=COLOUR["muted"], linewidth=1.0)
    least = min(result.ratio for result in results)
    axes.set_xlim(min(0.9, 0.85 * least), 1.25 * most)
    _rows(axes, [_short(result) for result in results], -0.6, "{:g}×")
    axes.spines["left"].set_visible(False)
    ratios = [f"{r.ratio:.1f}×" if r.ratio < 99.5 else f"{r.ratio:.0f}×" for r in results]
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(results)), ratios, fontweight="bold", color=COLOUR["ours"])
    right.spines["right"].set_visible(False)


def _short(result: Result) -> str:
    """A name that fits beside a bar: what the panel's title says is left out."""
    shape = [] if result.group == "mix" else [f"{k}{v}" for k, v in sizes(result.name).items()]
    marks = [mark for text, mark in _MARKS.items() if text in result.name]
    told = result.group.split()
    words = [*shape, *(mark for mark in marks if mark not in told)]
    return " ".join([*words, _DTYPES.get(result.dtype, result.dtype)])


def sizes(name: str) -> dict[str, int]:
    """The sizes in a case's name: B, H or Hq and Hkv, T, N, D."""
    return {key: int(value) for key, value in _LABELS.findall(name)}


def errors(axes: Axes, verdicts: Sequence[Verdict]) -> None:
    """Each tensor's error as a share of its budget, a row for each op, a colour for each dtype."""
    ops = list(dict.fromkeys(verdict.op for verdict in verdicts))
    for place, style in enumerate(_DTYPE_LOOKS):
        found = [v for v in verdicts if v.dtype == style.label]
        axes.plot(
            [min(max(v.share, _LEAST_SHARE), 10.0) for v in found],
            [ops.index(v.op) + 0.22 * (place - 1) for v in found],
            **style.dots(4.5, alpha=0.6),
        )
    axes.axvline(1.0, color=COLOUR["bad"], linewidth=1.2)
    axes.annotate(
        "budget",
        (1.0, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4, -2),
        textcoords="offset points",
        ha="right",
        va="top",
        color=COLOUR["bad"],
    )
    axes.set_xlim(0.8 * _LEAST_SHARE, 2.0 if all(v.ok for v in verdicts) else 12.0)
    _rows(axes, ops, -0.8, "{:g}")
    axes.set_xlabel("error against float64, as a share of its budget")


def _rows(axes: Axes, names: Sequence[str], top: float, form: str) -> None:
    """A named row at each whole y, from the top down, and a logarithmic x axis."""
    axes.set_xscale("log")
    decades(axes.xaxis, form.format)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.set_ylim(len(names) - 0.4, top)
    axes.grid(axis="x")

"""How figures look: one palette for light and dark, told apart by colour-blind readers too.

Figures are drawn in stand-in colours, which `as_svg` turns into CSS variables: the page, or the
file's own style, then gives each its value by the reader's colour scheme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.workloads.attention import MATH, X_TRANSFORMERS
from benchmarks.workloads.common import COMPILED, FLASH_ATTN
from benchmarks.workloads.decode import FOLDED, GQA, OWN_VALUES
from benchmarks.workloads.device import FA3, FLEX
from benchmarks.workloads.model import DYNAMIC, STATIC
from benchmarks.workloads.reservoir import LOOP as TORCH_LOOP
from benchmarks.workloads.reservoir import RESERVOIRPY, RNN
from benchmarks.workloads.scan import ASSOCIATIVE, COPY, LOOP
from resformer_kernels.bench.attention import HEADS_FIRST, NO_WINDOW, TIME_FIRST
from resformer_kernels.bench.timing import OURS

WIDTH = 5.2
"""Inches. A panel this wide is readable on a telephone, and two stand side by side."""

_LEGEND_CHARACTERS = 74
"""What fits beside one another in a legend, with six for each handle."""

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
_STAND_INS = {name: f"#0000{10 + place:02x}" for place, name in enumerate(PALETTE)}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def colour(name: str) -> str:
    """The stand-in for a colour of `PALETTE`."""
    return _STAND_INS[name]


class Look(NamedTuple):
    """How a contestant is drawn everywhere."""

    label: str
    colour: str
    marker: str = "o"
    dashes: str = "-"


ONE_VALUE = "one V"
"""Our decoding of an SVFormer, beside that of a V in each layer."""
_OTHER = Look("", "muted", "X")
_LOOKS = {
    OURS: Look("resformer_kernels", "ours"),
    HEADS_FIRST: Look("torch SDPA", "orange", "s"),
    TIME_FIRST: Look("torch SDPA", "orange", "s"),
    MATH: Look("torch SDPA, math", "muted", "D", "--"),
    COMPILED: Look("torch.compile", "green", "^"),
    FLEX: Look("FlexAttention", "purple", "v"),
    X_TRANSFORMERS: Look("x-transformers", "yellow", "P"),
    FLASH_ATTN: Look("flash-attn", "ink", "<"),
    FA3: Look("FlashAttention 3", "ink", ">"),
    NO_WINDOW: Look("ours without the window", "muted", "D"),
    GQA: Look("SDPA, enable_gqa", "muted", "D", "--"),
    FOLDED: Look("SDPA, group folded", "orange", "s"),
    OWN_VALUES: Look("ours, a V in each layer", "green", "^"),
    DYNAMIC: Look("sdpa, DynamicCache", "muted", "D", "--"),
    STATIC: Look("sdpa, StaticCache", "orange", "s"),
    ONE_VALUE: Look("ours, one V for all layers", "green", "^"),
    LOOP: Look("Python loop", "muted", "D", "--"),
    ASSOCIATIVE: Look("torch associative_scan", "orange", "s"),
    COPY: Look("a copy of as many bytes", "green", "^"),
    TORCH_LOOP: Look("torch loop", "orange", "s"),
    RNN: Look("torch.nn.RNN", "green", "^"),
    RESERVOIRPY: Look("ReservoirPy", "purple", "v"),
    "sum of products": Look("sum of products", "orange", "s"),
    "stack and einsum": Look("stack and einsum", "green", "^"),
    "indexing": Look("indexing", "yellow", "P"),
    "F.embedding": Look("F.embedding", "purple", "v"),
}


def look(contestant: str) -> Look:
    """Of a contestant; one that is not known is grey, under its own name."""
    return _LOOKS.get(contestant, _OTHER._replace(label=contestant))


def _style() -> Any:
    ink, muted, grid = colour("ink"), colour("muted"), colour("grid")
    return {
        "font.family": "DejaVu Sans",
        "font.size": 9.5,
        "text.color": ink,
        "axes.facecolor": "none",
        "axes.labelcolor": muted,
        "axes.edgecolor": muted,
        "axes.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": grid,
        "grid.linewidth": 0.8,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "legend.handlelength": 1.8,
        "legend.columnspacing": 1.4,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        # Text stays text: the page's own font, selectable, and small.
        "svg.fonttype": "none",
        "svg.hashsalt": "resformer_kernels",
    }


def as_svg(height: float, draw: Callable[..., None], *args: Any, **kwargs: Any) -> str:
    """What `draw(axes, *args, **kwargs)` draws, as SVG in CSS variables, without an XML head.

    `height` is in inches.
    """
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=colour("card"))
        FigureCanvasSVG(figure)
        draw(figure.add_subplot(), *args, **kwargs)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, stand_in in _STAND_INS.items():
        text = text.replace(stand_in, f"var(--{name})")
    # The size is the page's to choose; the box keeps the proportions.
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


def count(value: float, _place: object = None) -> str:
    """1k is 1024, as lengths have it; decimal where the value is no multiple of it."""
    for factor, unit in ((2**20, "M"), (2**10, "k")):
        if value >= factor and value % factor == 0:
            return f"{value / factor:.0f}{unit}"
    return f"{value:.0f}"


def powers_of_two(axes: Any, values: list[int]) -> None:
    """A logarithmic x axis with a tick at each value."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
    axes.xaxis.set_major_formatter(FuncFormatter(count))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = min(values), max(values)
    axes.set_xlim(low / 1.25, high * 1.25)


def decades(axis: Any, form: Callable[[float], str]) -> None:
    """Ticks of a logarithmic axis, written by `form`; between decades where there are few."""
    low, high = sorted(axis.get_view_interval())
    subs = (1.0,) if high / low > 200 else (1.0, 3.0) if high / low > 12 else (1.0, 2.0, 5.0)
    _ticks(axis, LogLocator(subs=subs, numticks=12), form)


def doublings(axis: Any, form: Callable[[float], str]) -> None:
    """The same for bytes: powers of two, as many as fit."""
    low, high = sorted(axis.get_view_interval())
    step = max(1, round(math.log2(high / low) / 5))
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    _ticks(axis, FixedLocator([2.0**power for power in powers if power % step == 0]), form)


def _ticks(axis: Any, locator: Any, form: Callable[[float], str]) -> None:
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))


def legend_above(axes: Any) -> None:
    """The legend over everything, each label once, ours first; as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    ours = _LOOKS[OURS].label
    unique = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0] != ours))
    longest = max(map(len, unique))
    axes.figure.legend(
        unique.values(),
        unique.keys(),
        loc="outside upper left",
        ncols=max(1, min(len(unique), _LEGEND_CHARACTERS // (longest + 6))),
        borderaxespad=0.1,
    )

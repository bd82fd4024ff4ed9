"""How figures look: one palette for light and dark, which colour-blind readers can tell apart too.

Figures are drawn in stand-in colours, which `as_svg` replaces by CSS variables. The page, or the
file's own style, gives each variable its value by the reader's colour scheme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Locator, LogLocator, NullLocator

from benchmarks.workloads import decode, device, model, reservoir, scan
from resformer_kernels.bench import attention, workloads
from resformer_kernels.bench.timing import OURS

WIDTH = 5.2
"""Inches. A panel this wide is readable on a telephone, and two fit side by side."""

_STYLE = Path(__file__).parent / "figures.mplstyle"
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


ONE_VALUE = Look("ours, one V for all layers", "green", "^")
"""Our decoding of an SVFormer, drawn beside decoding with a V in each layer."""
_LOOKS = {
    OURS: Look("resformer_kernels", "ours"),
    attention.HEADS_FIRST: Look("torch SDPA", "orange", "s"),
    attention.TIME_FIRST: Look("torch SDPA", "orange", "s"),
    attention.MATH: Look("torch SDPA, math", "muted", "D", "--"),
    workloads.COMPILED: Look("torch.compile", "green", "^"),
    device.FLEX: Look("FlexAttention", "purple", "v"),
    attention.X_TRANSFORMERS: Look("x-transformers", "yellow", "P"),
    workloads.FLASH_ATTN: Look("flash-attn", "ink", "<"),
    device.FA3: Look("FlashAttention 3", "ink", ">"),
    attention.NO_WINDOW: Look("ours without the window", "muted", "D"),
    decode.GQA: Look("SDPA, enable_gqa", "muted", "D", "--"),
    decode.FOLDED: Look("SDPA, group folded", "orange", "s"),
    decode.OWN_VALUES: Look("ours, a V in each layer", "green", "^"),
    model.DYNAMIC: Look("sdpa, DynamicCache", "muted", "D", "--"),
    model.STATIC: Look("sdpa, StaticCache", "orange", "s"),
    scan.LOOP: Look("Python loop", "muted", "D", "--"),
    scan.ASSOCIATIVE: Look("torch associative_scan", "orange", "s"),
    scan.COPY: Look("a copy of as many bytes", "green", "^"),
    reservoir.LOOP: Look("torch loop", "orange", "s"),
    reservoir.RNN: Look("torch.nn.RNN", "green", "^"),
    reservoir.RESERVOIRPY: Look("ReservoirPy", "purple", "v"),
    "sum of products": Look("sum of products", "orange", "s"),
    "stack and einsum": Look("stack and einsum", "green", "^"),
    "indexing": Look("indexing", "yellow", "P"),
    "F.embedding": Look("F.embedding", "purple", "v"),
}


def look(contestant: str) -> Look:
    """The look of a contestant; an unknown one is grey, under its own name."""
    return _LOOKS.get(contestant, Look(contestant, "muted", "X"))


def as_svg(height: float, draw: Callable[[Axes], None]) -> str:
    """What `draw` draws, as SVG in CSS variables without an XML head; `height` is in inches."""
    with matplotlib.rc_context(fname=_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor=COLOUR["card"])
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
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


def powers_of_two(axes: Axes, values: set[float]) -> None:
    """A logarithmic x axis with a tick at each value."""
    axes.set_xscale("log", base=2)
    _ticks(axes.xaxis, FixedLocator(sorted(values)), count)
    axes.set_xlim(min(values) / 1.25, max(values) * 1.25)


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


def legend_above(axes: Axes) -> None:
    """The legend above the axes, each label once, ours first; as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    ours = look(OURS).label
    unique = dict(sorted(zip(labels, handles, strict=True), key=lambda pair: pair[0] != ours))
    columns = _LEGEND_CHARACTERS // (max(map(len, unique)) + 6)
    axes.figure.legend(
        unique.values(),
        unique.keys(),
        loc="outside upper left",
        ncols=max(1, min(len(unique), columns)),
        borderaxespad=0.1,
    )

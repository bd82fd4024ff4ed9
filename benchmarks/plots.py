"""The kinds of plot in a report, each drawn on axes that it is given: lines, bars, errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis

from benchmarks.figure_data import Curve, sizes
from benchmarks.figure_style import (
    COLOUR,
    Look,
    decades,
    legend_above,
    look,
    powers_of_two,
)
from resformer_kernels.bench.timing import OURS, Result
from resformer_kernels.testing.verification import Verdict

_DOT: dict[str, Any] = {"linestyle": "none", "markeredgewidth": 0}
_LEAST_SHARE = 1e-3
"""Smaller errors are drawn here, at the left edge."""
_DTYPE_LOOKS = {"float32": ("ours", "o"), "bfloat16": ("orange", "s"), "float16": ("green", "^")}
_DTYPES = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "complex64": "c64"}
_MARKS = {
    "mix_value_embedding": "embedding",
    "of 2 ": "2 sources",
    "of 8 ": "8 sources",
    "one V": "one V",
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
            color=COLOUR[style.colour],
            marker=style.marker,
            linestyle=style.dashes,
            linewidth=2.4 if style == ours else 1.6,
            label=style.label,
        )
    powers_of_two(axes, {x for points in curve.values() for x in points})
    axes.set_yscale("log")
    if ceiling is not None:
        # Named in the legend: a name beside the rule would lie on one of the lines.
        label, value = ceiling
        axes.axhline(value, color=COLOUR["ink"], linewidth=1.0, linestyle=(0, (5, 3)), label=label)
        low, high = axes.get_ylim()
        axes.set_ylim(low, max(high, 1.5 * value))
    ticks(axes.yaxis, form)
    axes.grid()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    legend_above(axes)


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
            form = {"marker": style.marker, "color": COLOUR[style.colour], "label": style.label}
            axes.plot(ratio, y, markersize=6, **(_DOT | form))
    axes.axvline(1.0, color=COLOUR["muted"], linewidth=1.0)
    least = min(result.ratio for result in results)
    axes.set_xlim(min(0.9, 0.85 * least), 1.25 * most)
    _rows(axes, [_short(result) for result in results], -0.6, "{:g}×")
    axes.spines["left"].set_visible(False)
    ratios = [f"{r.ratio:.1f}×" if r.ratio < 99.5 else f"{r.ratio:.0f}×" for r in results]
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(results)), ratios, fontweight="bold", color=COLOUR["ours"])
    right.spines["right"].set_visible(False)
    legend_above(axes)


def _short(result: Result) -> str:
    """A name that fits beside a bar: what the panel's title says is left out."""
    shape = [] if result.group == "mix" else [f"{k}{v}" for k, v in sizes(result.name).items()]
    marks = [mark for text, mark in _MARKS.items() if text in result.name]
    told = result.group.split()
    words = [*shape, *(mark for mark in marks if mark not in told)]
    return " ".join([*words, _DTYPES.get(result.dtype, result.dtype)])


def errors(axes: Axes, verdicts: Sequence[Verdict]) -> None:
    """Each tensor's error as a share of its budget, a row for each op, a colour for each dtype."""
    ops = list(dict.fromkeys(verdict.op for verdict in verdicts))
    for place, (dtype, (colour, marker)) in enumerate(_DTYPE_LOOKS.items()):
        found = [v for v in verdicts if v.dtype == dtype]
        axes.plot(
            [min(max(v.share, _LEAST_SHARE), 10.0) for v in found],
            [ops.index(v.op) + 0.22 * (place - 1) for v in found],
            marker=marker,
            markersize=4.5,
            alpha=0.6,
            color=COLOUR[colour],
            label=dtype,
            **_DOT,
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
    legend_above(axes)


def _rows(axes: Axes, names: Sequence[str], top: float, form: str) -> None:
    """A named row at each whole y, from the top down, and a logarithmic x axis."""
    axes.set_xscale("log")
    decades(axes.xaxis, form.format)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.set_ylim(len(names) - 0.4, top)
    axes.grid(axis="x")

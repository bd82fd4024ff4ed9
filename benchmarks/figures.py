"""The figures of a report, from whatever runs it is given: no figure without its data."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from benchmarks import curves
from benchmarks.figure_bars import speed
from benchmarks.figure_data import Cases, Drawing, sizes
from benchmarks.figure_style import (
    ONE_VALUE,
    as_svg,
    colour,
    count,
    decades,
    doublings,
    legend_above,
    look,
    powers_of_two,
)
from benchmarks.runner import Run
from resformer_kernels.bench.tables import duration
from resformer_kernels.bench.timing import OURS, Result


def draw(runs: Sequence[Run]) -> list[Drawing]:
    """Every figure that these runs have the data for, in the order of the page."""
    cases = Cases(runs)
    found = [*speed(cases), *_length(cases), *_decode(cases), *_scan(cases), *_reservoir(cases)]
    return [*found, *_errors(cases)]


Curve = dict[str, list[tuple[float, float]]]
"""Points of each contestant's line, by its label."""


def _lines(
    axes: Any,
    curve: dict[str, list[tuple[float, float]]],
    *,
    xlabel: str,
    ylabel: str,
    form: Callable[[float], str],
    ticks: Callable[[Any, Callable[[float], str]], None] = decades,
    ceiling: tuple[str, float] | None = None,
) -> None:
    """Lines on logarithmic axes, ours on top; a ceiling is a dashed rule."""
    for name in sorted(curve, key=lambda name: name == OURS):
        style = look(name)
        points = sorted(curve[name])
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=colour(style.colour),
            marker=style.marker,
            linestyle=style.dashes,
            linewidth=2.4 if name == OURS else 1.6,
            label=style.label,
        )
    powers_of_two(axes, [int(x) for points in curve.values() for x, _ in points])
    axes.set_yscale("log")
    if ceiling is not None:
        label, value = ceiling
        # Named in the legend: beside the rule its name would lie on somebody's line.
        axes.axhline(value, color=colour("ink"), linewidth=1.0, linestyle=(0, (5, 3)), label=label)
        low, high = axes.get_ylim()
        axes.set_ylim(low, max(high, 1.5 * value))
    ticks(axes.yaxis, form)
    axes.grid()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    legend_above(axes)


def _curve(
    found: Sequence[tuple[Result, Run]],
    x: str,
    y: Callable[[Result, str], float | None],
) -> Curve:
    """The best of the contestants that share a label, over one size of the cases."""
    lines: dict[str, dict[float, float]] = {}
    names: dict[str, str] = {}
    for result, _ in found:
        for contestant in result.timings:
            value = y(result, contestant)
            if value is None or value <= 0:
                continue
            name = names.setdefault(look(contestant).label, contestant)
            line = lines.setdefault(name, {})
            place = float(sizes(result.name)[x])
            line[place] = min(value, line.get(place, value))
    return {name: list(line.items()) for name, line in lines.items()}


def _points(curve: Curve) -> int:
    return max((len(points) for points in curve.values()), default=0)


def _median(result: Result, contestant: str) -> float:
    return result.timings[contestant].median


def _peak(result: Result, contestant: str) -> float | None:
    return result.peak_bytes.get(contestant)


def _mib(value: float) -> str:
    size = value / 2**20
    return f"{size / 1024:g} GiB" if size >= 1024 else f"{size:.3g} MiB"


def _length(cases: Cases) -> list[Drawing]:
    section = "Time and memory over the length"
    shape = f"B1 H{curves.CURVE_HEADS} D{curves.CURVE_HEAD_DIM}, causal, bfloat16."
    drawings = []
    for direction in ("forward", "backward"):
        chosen = [case for case in curves.attention() if case.group.endswith(direction)]
        found = cases.of(chosen)
        for kind, title, y, form, ticks in (
            ("time", "Time", _median, duration, decades),
            ("memory", "Memory that a call takes", _peak, _mib, doublings),
        ):
            curve = _curve(found, "T", y)
            if _points(curve) < 2:
                continue
            svg = as_svg(3.5, _lines, curve, xlabel="length T", ylabel="", form=form, ticks=ticks)
            caption = f"{shape} Mixing included."
            if kind == "memory" and direction == "backward":
                caption += " What the forward saved for it is there before, and not in it."
            name = f"length-{kind}-{direction}"
            drawings.append(Drawing(name, section, f"{title}, {direction}", caption, svg))
    curve = _memory_curve(cases)
    if _points(curve) >= 2:
        svg = as_svg(3.5, _lines, curve, xlabel="length T", ylabel="", form=_mib, ticks=doublings)
        caption = (
            "Peak of forward and backward beyond the inputs: output, gradients and what is saved "
            "in between. Two heads of 64, bfloat16, a fresh process each."
        )
        title = "Memory, forward and backward"
        drawings.append(Drawing("memory-training", section, title, caption, svg))
    return drawings


def _memory_curve(cases: Cases) -> Curve:
    curve: Curve = {}
    for (contestant, length), point in cases.memory.items():
        name = OURS if contestant == OURS else "SDPA (B,H,T,D)"
        curve.setdefault(name, []).append((float(length), float(point.bytes)))
    return curve


def _decode(cases: Cases) -> list[Drawing]:
    drawings = []
    for group in curves.GRID_GROUPS:
        curve: Curve = {}
        ceilings = []
        for case in curves.decode_grid():
            if case.batch != 1 or case.heads != group * case.kv_heads:
                continue
            for result, run in cases.of([case]):
                ceilings.append(run.bandwidth.get("read", 0.0))
                # What is attended over: the bytes of a V in each layer, for one V as well.
                attended = replace(case, shared=False).bytes
                for contestant, timing in result.timings.items():
                    if case.shared and contestant != OURS:
                        continue
                    name = ONE_VALUE if case.shared else contestant
                    point = (float(case.length), attended / timing.median)
                    curve.setdefault(name, []).append(point)
        if _points(curve) < 2:
            continue
        rule = ("bandwidth of reading", max(ceilings))
        svg = as_svg(
            3.7,
            _lines,
            curve,
            xlabel="tokens in the cache",
            ylabel="GB/s of keys and values",
            form=lambda value: f"{value / 1e9:g}",
            ceiling=rule,
        )
        per = "one query head" if group == 1 else f"{group} query heads"
        caption = (
            f"One token through 12 layers, B1 Hkv{curves.GRID_KV_HEADS} D{curves.GRID_HEAD_DIM}, "
            "bfloat16; keys and values that are attended over. One V for all layers (SVFormer) is "
            "counted in each, though memory holds it once: its line may pass the ceiling."
        )
        title = f"Decoding, {per} a KV head"
        section = "Decoding over the context"
        drawings.append(Drawing(f"decode-group{group}", section, title, caption, svg))
    return drawings


def _scan(cases: Cases) -> list[Drawing]:
    base = [
        pair
        for name, pair in cases.found.items()
        if name == "linear_scan forward B1 T8192 N1024 gates by step float32"
    ]
    found = [*cases.of(curves.scan()), *base]
    panels = (("T", "N", 1024, "length T"), ("N", "T", 8192, "channels N"))
    drawings = []
    for x, fixed, at, xlabel in panels:
        chosen = [pair for pair in found if sizes(pair[0].name)[fixed] == at]
        inverse = _curve(chosen, x, lambda r, n: r.timings[n].median / r.bytes)
        curve = {name: [(px, 1 / py) for px, py in points] for name, points in inverse.items()}
        if _points(curve) < 2:
            continue
        rule = ("bandwidth of a copy", chosen[0][1].bandwidth["copy"])
        svg = as_svg(
            3.6,
            _lines,
            curve,
            xlabel=xlabel,
            ylabel="GB/s of gates, tokens and states",
            form=lambda value: f"{value / 1e9:g}",
            ceiling=rule,
        )
        pages = (
            "States go to pages that are there."
            if all(run.freed_memory_kept for _, run in chosen)
            else "States beyond 32 MiB come in fresh pages of memory at every call, and what the "
            "system does for them counts."
        )
        caption = f"Forward, B1 {fixed}{count(at)}, gates by step, float32. {pages}"
        title = f"Linear scan over {xlabel}"
        drawings.append(Drawing(f"scan-{x.lower()}", "Scans and reservoirs", title, caption, svg))
    return drawings


def _reservoir(cases: Cases) -> list[Drawing]:
    extra = [
        pair
        for name, pair in cases.found.items()
        if re.fullmatch(r"reservoir_scan dense B1 T16384 N256 float32", name)
    ]
    found = [*cases.of(curves.reservoir()), *extra]
    length, units = curves.RESERVOIR_CURVE_LENGTH, curves.RESERVOIR_CURVE_UNITS
    panels = (("N", "T", length, "units N"), ("T", "N", units, "steps T"))
    drawings = []
    for x, fixed, at, xlabel in panels:
        chosen = [pair for pair in found if sizes(pair[0].name)[fixed] == at]
        curve = _curve(chosen, x, lambda r, n: r.timings[n].median / sizes(r.name)["T"])
        if _points(curve) < 2:
            continue
        svg = as_svg(3.6, _lines, curve, xlabel=xlabel, ylabel="time a step", form=duration)
        caption = (
            f"Dense float32 weights, B1 {fixed}{count(at)}, leak 0.3, spectral radius 0.9; "
            "ReservoirPy with its default, a tenth of the weights."
        )
        title = f"Reservoir over {xlabel}"
        drawings.append(
            Drawing(f"reservoir-{x.lower()}", "Scans and reservoirs", title, caption, svg)
        )
    return drawings


_DTYPES = (("float32", "ours", "o"), ("bfloat16", "orange", "s"), ("float16", "green", "^"))
_LEAST_SHARE = 1e-3


def _errors(cases: Cases) -> list[Drawing]:
    if not cases.errors:
        return []
    ops = list(dict.fromkeys(verdict.op for verdict in cases.errors))

    def draw(axes: Any) -> None:
        for place, (dtype, name, marker) in enumerate(_DTYPES):
            found = [v for v in cases.errors if v.dtype == dtype]
            axes.plot(
                [min(max(v.share, _LEAST_SHARE), 10.0) for v in found],
                [ops.index(v.op) + 0.22 * (place - 1) for v in found],
                linestyle="none",
                marker=marker,
                markersize=4.5,
                markeredgewidth=0,
                alpha=0.6,
                color=colour(name),
                label=dtype,
            )
        axes.axvline(1.0, color=colour("bad"), linewidth=1.2)
        axes.annotate(
            "budget",
            (1.0, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -2),
            textcoords="offset points",
            ha="right",
            va="top",
            color=colour("bad"),
        )
        axes.set_xscale("log")
        axes.set_xlim(0.8 * _LEAST_SHARE, 2.0 if all(v.ok for v in cases.errors) else 12.0)
        decades(axes.xaxis, lambda value: f"{value:g}")
        axes.set_yticks(range(len(ops)), ops, fontsize=8.5)
        axes.set_ylim(len(ops) - 0.4, -0.8)
        axes.grid(axis="x")
        axes.set_xlabel("error against float64, as a share of its budget")
        legend_above(axes)

    caption = (
        "Every tensor, forward and backward. The budget is twice the error of plain PyTorch in the "
        "same precision, plus one rounding of the terms summed; the left edge is a thousandth of "
        "it or less."
    )
    svg = as_svg(1.1 + 0.42 * len(ops), draw)
    return [Drawing("errors", "Errors", "Error against float64", caption, svg)]

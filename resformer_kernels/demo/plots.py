"""The report's plots. Each function writes one PNG from what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from resformer_kernels.bench.timing import Result
from resformer_kernels.demo.training import ModelRun, Plan
from resformer_kernels.testing.verification import Verdict

_INK, _MUTED, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_OURS, _PEER = "#0f766e", "#b8c2cc"
_DTYPE_COLOURS = {"float32": "#1d4ed8", "bfloat16": "#0f766e", "float16": "#c2410c"}
_MODEL_COLOURS = {"Transformer": "#64748b", "ResFormer": "#0f766e", "SVFormer": "#c2410c"}
_LEAST_SHARE = 1e-4
_EARLY = 0.15
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.2)


def plot_errors(verdicts: Sequence[Verdict], path: Path) -> None:
    """Every error as a share of its budget, a row a tensor, a colour a dtype."""
    rows = list(
        dict.fromkeys(
            (v.op.removesuffix("_varlen"), v.tensor.split("[")[0])
            for v in sorted(verdicts, key=lambda v: v.op)
        )
    )
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 1.6 + 0.26 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        dtypes = list(dict.fromkeys(v.dtype for v in verdicts))
        for index, dtype in enumerate(dtypes):
            shift = 0.24 * (index - (len(dtypes) - 1) / 2)
            found = [v for v in verdicts if v.dtype == dtype]
            axes.scatter(
                [min(max(v.share, _LEAST_SHARE), 100.0) for v in found],
                [
                    rows.index((v.op.removesuffix("_varlen"), v.tensor.split("[")[0])) + shift
                    for v in found
                ],
                s=16,
                alpha=0.7,
                linewidths=0,
                color=_DTYPE_COLOURS.get(dtype, _INK),
                label=dtype,
            )
        axes.axvline(1.0, color="#b91c1c", linewidth=1.2)
        axes.annotate(
            "budget ",
            (1.0, 1.0),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="bottom",
            color="#b91c1c",
        )
        axes.set_xscale("log")
        axes.set_xlim(_LEAST_SHARE * 0.8, 3.0 if all(v.ok for v in verdicts) else 150.0)
        axes.set_yticks(range(len(rows)), [f"{op}  {tensor}" for op, tensor in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x")
        axes.set_xlabel(
            "error against float64, as a share of its budget (left edge: 0.0001 or less)"
        )
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, handletextpad=0.1)
        _save(figure, path)


def _short(result: Result) -> str:
    # "attention forward B1 H16 T2048 D64 causal bfloat16" -> "B1 H16 T2048 D64"
    words = [w for w in result.name.split() if w[0] in "BHTD" and w[-1].isdigit()]
    return " ".join(words)


def plot_speed(results: Sequence[Result], gemm: dict[str, float], path: Path) -> None:
    """GFLOP/s of ours and the fastest peer, a panel a direction."""
    directions = [d for d in ("forward", "backward") if any(d in r.name for r in results)]
    panels = {d: [r for r in results if d in r.name] for d in directions}
    rows = max(len(found) for found in panels.values())
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 1.5 + 0.62 * rows), layout="constrained")
        all_axes = figure.subplots(1, len(directions), squeeze=False)[0]
        for axes, direction in zip(all_axes, directions, strict=True):
            _speed_panel(axes, panels[direction], gemm)
            axes.set_title(f"{direction}, mixing included")
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        _save(figure, path)


def _speed_panel(axes: Any, found: Sequence[Result], gemm: dict[str, float]) -> None:
    for y, result in enumerate(found):
        ours = result.flops / result.ours.median / 1e9
        peer = result.flops / result.timings[result.peer].median / 1e9
        first = y == 0
        axes.barh(y - 0.19, ours, 0.36, color=_OURS, label="resformer_kernels" if first else None)
        axes.barh(y + 0.19, peer, 0.36, color=_PEER, label="mix + torch SDPA" if first else None)
        axes.annotate(
            f"{result.ratio:.2f}x",
            (ours, y - 0.19),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            weight="bold",
            color=_OURS,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85},
            zorder=5,
        )
        if result.dtype in gemm:
            rate = gemm[result.dtype] / 1e9
            label = "torch GEMM 2048³, the same dtype" if first else None
            axes.plot([rate, rate], [y - 0.42, y + 0.42], color=_INK, linewidth=1.4, label=label)
    axes.set_yticks(range(len(found)), [f"{_short(r)}\n{r.dtype}" for r in found], fontsize=9)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.grid(axis="x")
    axes.set_xlabel("GFLOP/s of attended pairs (longer is faster)")


def plot_learning(runs: Sequence[ModelRun], plan: Plan, path: Path) -> None:
    """Held-out bits a byte over the text seen, with the smoothed training loss behind."""
    seen = plan.batch * plan.seqlen / 1e6
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for run in runs:
            colour = _MODEL_COLOURS[run.name]
            smooth = _smoothed(run.losses)
            xs = [(step + 1) * seen for step in range(len(smooth))]
            axes.plot(xs, smooth, color=colour, alpha=0.3, linewidth=1)
            points = list(run.curve)
            if run.final_bits is not None:
                points.append((run.steps, run.final_bits))
            final = f"{run.latest_bits:.3f}" if run.latest_bits is not None else "none yet"
            axes.plot(
                [step * seen for step, _ in points],
                [bits for _, bits in points],
                color=colour,
                marker="o",
                markersize=4,
                linewidth=1.8,
                label=f"{run.name}: {final}",
            )
        # The fall from 8 bits, alike for all, would flatten everything that follows.
        late = [bits for run in runs for step, bits in run.curve[1:] if step >= _EARLY * run.steps]
        if len(late) > len(runs):
            late += [run.final_bits for run in runs if run.final_bits is not None]
            axes.set_ylim(min(late) - 0.15, max(late) + 0.4)
        axes.set_xlabel("text seen by each model (MB)")
        axes.set_ylabel("bits per byte")
        axes.set_title("Held-out bits per byte (faint: training loss, smoothed)")
        axes.grid()
        axes.legend(title="last held-out figure", alignment="left")
        _save(figure, path)


def _smoothed(values: Sequence[float]) -> list[float]:
    decay = 0.95 if len(values) > 100 else 0.7
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else decay * smooth[-1] + (1 - decay) * value)
    return smooth


def plot_cost(runs: Sequence[ModelRun], path: Path) -> None:
    """Step time and activation memory of each model."""
    timed = [run for run in runs if run.median_step is not None]
    panels = (
        ("Step time", "ms a step (median)", [1e3 * (run.median_step or 0.0) for run in timed]),
        (
            "Activation memory",
            "MiB saved for backward",
            [r.activation_bytes / 2**20 for r in timed],
        ),
    )
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.6, 2.6), layout="constrained")
        for axes, (title, unit, values) in zip(figure.subplots(1, 2), panels, strict=True):
            colours = [_MODEL_COLOURS[run.name] for run in timed]
            bars = axes.barh([run.name for run in timed], values, 0.6, color=colours)
            axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=4)
            axes.invert_yaxis()
            axes.margins(x=0.15)
            axes.grid(axis="x")
            axes.set_title(title)
            axes.set_xlabel(unit)
        _save(figure, path)

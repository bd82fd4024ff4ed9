"""The report's plots. Each function writes one PNG from what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from resformer_kernels.bench.timing import Result
from resformer_kernels.demo.training import ModelRun, Plan
from resformer_kernels.testing.verification import Verdict

_INK, _OURS, _PEER, _LIMIT = "#1f2933", "#0f766e", "#b8c2cc", "#b91c1c"
_DTYPE_COLOURS = {"float32": "#1d4ed8", "bfloat16": "#0f766e", "float16": "#c2410c"}
_MODEL_COLOURS = {"Transformer": "#64748b", "ResFormer": "#0f766e", "SVFormer": "#c2410c"}
_LEAST_SHARE = 1e-4
_EARLY = 0.15
_STYLE: Any = [
    "seaborn-v0_8-whitegrid",
    {"axes.titlelocation": "left", "axes.titleweight": "bold", "axes.grid.axis": "x"},
]


@contextmanager
def _figure(path: Path, width: float, height: float, panels: int = 1) -> Iterator[Any]:
    """A figure with panels side by side, saved at the end."""
    with style.context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.subplots(1, panels)
        yield figure
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.2)


def _rows(axes: Any, labels: Sequence[str], **style: Any) -> None:
    """Label rows, the first at the top."""
    axes.set_yticks(range(len(labels)), labels, **style)
    axes.set_ylim(len(labels) - 0.4, -0.6)


def plot_errors(verdicts: Sequence[Verdict], path: Path) -> None:
    """Every error as a share of its budget, a row a tensor, a colour a dtype."""

    def label(v: Verdict) -> str:
        return f"{v.op.removesuffix('_varlen')}  {v.tensor.split('[')[0]}"

    rows = list(dict.fromkeys(label(v) for v in sorted(verdicts, key=lambda v: v.op)))
    dtypes = list(dict.fromkeys(v.dtype for v in verdicts))
    with _figure(path, 8.6, 1.6 + 0.26 * len(rows)) as figure:
        (axes,) = figure.axes
        for index, dtype in enumerate(dtypes):
            shift = 0.24 * (index - (len(dtypes) - 1) / 2)
            found = [v for v in verdicts if v.dtype == dtype]
            shares = [min(max(v.share, _LEAST_SHARE), 100.0) for v in found]
            places = [rows.index(label(v)) + shift for v in found]
            colour = _DTYPE_COLOURS.get(dtype, _INK)
            axes.scatter(shares, places, s=16, alpha=0.7, linewidths=0, color=colour, label=dtype)
        axes.axvline(1.0, color=_LIMIT, linewidth=1.2)
        above = {"xycoords": ("data", "axes fraction"), "ha": "right", "va": "bottom"}
        axes.annotate("budget ", (1.0, 1.0), color=_LIMIT, **above)
        axes.set_xscale("log")
        axes.set_xlim(_LEAST_SHARE * 0.8, 3.0 if all(v.ok for v in verdicts) else 150.0)
        _rows(axes, rows)
        axes.set_xlabel(
            "error against float64, as a share of its budget (left edge: 0.0001 or less)"
        )
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, handletextpad=0.1)


def plot_speed(results: Sequence[Result], gemm: dict[str, float], path: Path) -> None:
    """GFLOP/s of ours and the fastest peer, a panel a direction."""
    panels = {d: [r for r in results if d in r.name] for d in ("forward", "backward")}
    panels = {direction: found for direction, found in panels.items() if found}
    rows = max(len(found) for found in panels.values())
    with _figure(path, 11, 1.5 + 0.62 * rows, len(panels)) as figure:
        for axes, (direction, found) in zip(figure.axes, panels.items(), strict=True):
            _speed_panel(axes, found, gemm)
            axes.set_title(f"{direction}, mixing included")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)


def _speed_panel(axes: Any, found: Sequence[Result], gemm: dict[str, float]) -> None:
    ours = [r.flops / r.ours.median / 1e9 for r in found]
    peers = [r.flops / r.timings[r.peer].median / 1e9 for r in found]
    places = range(len(found))
    bars = axes.barh([y - 0.19 for y in places], ours, 0.36, color=_OURS, label="resformer_kernels")
    axes.barh([y + 0.19 for y in places], peers, 0.36, color=_PEER, label="mix + torch SDPA")
    ratios = [f"{r.ratio:.2f}x" for r in found]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
    axes.bar_label(bars, ratios, padding=5, weight="bold", color=_OURS, bbox=box, zorder=5)
    rates = [(y, gemm[r.dtype] / 1e9) for y, r in enumerate(found) if r.dtype in gemm]
    if rates:
        axes.vlines(
            [rate for _, rate in rates],
            [y - 0.42 for y, _ in rates],
            [y + 0.42 for y, _ in rates],
            color=_INK,
            linewidth=1.4,
            label="torch GEMM 2048³, the same dtype",
        )
    _rows(axes, [f"{_shape(r)}\n{r.dtype}" for r in found], fontsize=9)
    axes.margins(x=0.2)
    axes.set_xlabel("GFLOP/s of attended pairs (longer is faster)")


def _shape(result: Result) -> str:
    """B1 H16 T2048 D64 of "attention forward B1 H16 T2048 D64 causal bfloat16"."""
    return " ".join(w for w in result.name.split() if w[0] in "BHTD" and w[-1].isdigit())


def plot_learning(runs: Sequence[ModelRun], plan: Plan, path: Path) -> None:
    """Held-out bits a byte over the text seen, with the smoothed training loss behind."""
    seen = plan.batch * plan.seqlen / 1e6
    with _figure(path, 8.6, 4.6) as figure:
        (axes,) = figure.axes
        for run in runs:
            colour = _MODEL_COLOURS[run.name]
            xs = [(step + 1) * seen for step in range(run.steps)]
            axes.plot(xs, _smoothed(run.losses), color=colour, alpha=0.3, linewidth=1)
            steps, bits = zip(*run.curve, (run.steps, run.latest_bits), strict=True)
            xs, label = [step * seen for step in steps], f"{run.name}: {run.latest_bits:.3f}"
            axes.plot(xs, bits, color=colour, marker="o", markersize=4, linewidth=1.8, label=label)
        # The fall from 8 bits, alike for all, would flatten everything that follows.
        late = [bits for run in runs for step, bits in run.curve[1:] if step >= _EARLY * run.steps]
        if len(late) > len(runs):
            late += [run.final_bits for run in runs if run.final_bits is not None]
            axes.set_ylim(min(late) - 0.15, max(late) + 0.4)
        axes.set_xlabel("text seen by each model (MB)")
        axes.set_ylabel("bits per byte")
        axes.set_title("Held-out bits per byte (faint: training loss, smoothed)")
        axes.grid(axis="both")
        axes.legend(title="last held-out figure", alignment="left")


def _smoothed(values: Sequence[float]) -> list[float]:
    decay = 0.95 if len(values) > 100 else 0.7
    return list(accumulate(values, lambda mean, value: decay * mean + (1 - decay) * value))


def plot_cost(runs: Sequence[ModelRun], path: Path) -> None:
    """Step time and activation memory of each model."""
    memory = [run.activation_bytes / 2**20 for run in runs]
    panels = (
        ("Step time", "ms a step (median)", [1e3 * run.median_step for run in runs]),
        ("Activation memory", "MiB saved for backward", memory),
    )
    with _figure(path, 8.6, 2.6, len(panels)) as figure:
        for axes, (title, unit, values) in zip(figure.axes, panels, strict=True):
            colours = [_MODEL_COLOURS[run.name] for run in runs]
            bars = axes.barh([run.name for run in runs], values, 0.6, color=colours)
            axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=4)
            axes.invert_yaxis()
            axes.margins(x=0.15)
            axes.set_title(title)
            axes.set_xlabel(unit)

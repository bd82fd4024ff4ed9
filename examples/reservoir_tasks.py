"""Four tasks that reservoirs are judged by, beside ReservoirPy-style echo state networks.

    python examples/reservoir_tasks.py --out reports/reservoir_tasks

NARMA-10 (a nonlinear system of memory 10), Mackey-Glass with delay 17 (a chaotic series: the next
step, and 84 steps fed back), Lorenz (how long a fed-back prediction stays valid) and memory
capacity (how many past inputs can be read from one state). Figures are means over seeds, with their
sample standard deviation; `--json` stores those of every seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from resformer_kernels.nn import Reservoir, Ridge
from resformer_kernels.tasks import (
    LORENZ_EXPONENT,
    delays,
    lorenz,
    mackey_glass,
    mean_and_spread,
    memory_capacity,
    narma10,
    nmse,
    nrmse,
    valid_steps,
)
from resformer_kernels.testing import machine

STRENGTHS = (1e-10, 1e-8, 1e-6, 1e-4)
LORENZ_STEP = 0.02
"""Units of time between two samples."""


def states_of(reservoir: Reservoir, inputs: Tensor) -> Tensor:
    """(T, N) of inputs (T, n_in), in the reservoir's dtype: the kernels' float32, or float64."""
    exact = reservoir.leak.dtype is torch.float64
    # The reference serves float64, step by step; "auto" would warn that it is slow.
    reservoir.backend = "reference" if exact else "auto"
    states, _ = reservoir(inputs[None].to(reservoir.leak.dtype))
    return states[0]


@dataclass(frozen=True)
class Figures:
    """What one run of a task gave: its figures by name, and two curves to draw."""

    values: dict[str, float]
    wanted: Tensor
    predicted: Tensor


Run = Callable[[int, int, float, torch.dtype], Figures]


@dataclass(frozen=True)
class Case:
    """A task at one size, and the figures to hold it against."""

    task: str
    units: int
    run: Run
    anchors: dict[str, float]
    greater_is_better: bool = False


def fit(states: Tensor, targets: Tensor, held_out: int) -> Ridge:
    """A readout whose strength is chosen on the last `held_out` rows, then fitted to all."""
    readout = Ridge(states.shape[1], targets.shape[1], STRENGTHS)
    readout.fit(states[:-held_out], targets[:-held_out])
    readout.select(states[-held_out:], targets[-held_out:])
    chosen = STRENGTHS.index(readout.strength or STRENGTHS[0])
    return readout.update(states[-held_out:], targets[-held_out:]).solve().take(chosen)


def narma(units: int, seed: int, size: float, dtype: torch.dtype) -> Figures:
    """NMSE of NARMA-10 on held-out steps."""
    train, test, washout = round(4000 * size), round(2000 * size), 200
    u, y = narma10(washout + train + test, seed=seed)
    reservoir = Reservoir(
        units,
        1,
        sr=0.9,
        input_scaling=0.05,
        bias_scaling=0.5,
        input_connectivity=1.0,
        seed=seed,
    )
    states = states_of(reservoir.to(dtype), u)
    readout = fit(states[washout:-test], y[washout:-test], train // 5)
    predicted = readout(states[-test:])
    return Figures({"NMSE": nmse(predicted, y[-test:])}, y[-test:], predicted)


def mackey(units: int, seed: int, size: float, dtype: torch.dtype) -> Figures:
    """One-step NRMSE, and the NRMSE of the 84th step fed back, over 50 starts."""
    train, test, washout, starts = round(10000 * size), round(3000 * size), 500, 50
    x = mackey_glass(washout + train + test + 1, seed=seed) - 0.93
    reservoir = Reservoir(
        units,
        1,
        sr=1.0,
        lr=0.6,
        input_scaling=1.0,
        bias_scaling=0.3,
        input_connectivity=1.0,
        seed=seed,
    )
    states = states_of(reservoir.to(dtype), x[:-1])
    targets = x[1:]
    end = washout + train
    readout = fit(states[washout:end], targets[washout:end], train // 5)
    one_step = nrmse(readout(states[end:]), targets[end:])
    first = torch.linspace(end, end + test - 85, starts).long()
    outputs, _ = reservoir.free_run(readout, states[first], 84)
    wanted = targets[first + 83]
    spread = float(targets.std())
    far = float((outputs[:, 83] - wanted).square().mean().sqrt()) / spread
    shown = targets[int(first[0]) : int(first[0]) + 84]
    return Figures(
        {"one-step NRMSE": one_step, "log10 NRMSE84": math.log10(far)}, shown, outputs[0]
    )


def lorenz_run(units: int, seed: int, size: float, dtype: torch.dtype) -> Figures:
    """Median valid time, in Lyapunov times, of 20 predictions fed back."""
    step, train, washout, starts = LORENZ_STEP, round(8000 * size), 200, 20
    steps = math.ceil(20 / (LORENZ_EXPONENT * step))
    x = lorenz(washout + train + 100 * starts + steps + 1, step=step, seed=seed)
    mean, spread = x[:train].mean(0), x[:train].std()
    x = (x - mean) / spread
    reservoir = Reservoir(
        units,
        3,
        sr=0.6,
        lr=1.0,
        input_scaling=0.1,
        bias_scaling=0.5,
        input_connectivity=1.0,
        seed=seed,
    )
    states = states_of(reservoir.to(dtype), x[:-1])
    end = washout + train
    readout = fit(states[washout:end], x[washout + 1 : end + 1], train // 5)
    first = end + 100 * torch.arange(starts)
    outputs, _ = reservoir.free_run(readout, states[first], steps)
    valid = [
        valid_steps(out, x[start + 1 : start + 1 + steps]) * step * LORENZ_EXPONENT
        for start, out in zip(first.tolist(), outputs, strict=True)
    ]
    start = int(first[0]) + 1
    return Figures(
        {"valid Lyapunov times": statistics.median(valid)},
        x[start : start + steps, :1],
        outputs[0, :, :1],
    )


def capacity(topology: str, activation: str) -> Run:
    """Memory capacity of a ring or a random reservoir."""

    def run(units: int, seed: int, size: float, dtype: torch.dtype) -> Figures:
        train, test, washout = round(30000 * size), round(10000 * size), 10 * units
        longest = 2 * units
        u, past = delays(washout + train + test, longest, seed=seed)
        linear = activation == "identity"
        reservoir = Reservoir(
            units,
            1,
            topology=topology,
            activation=activation,
            sr=0.95 if linear else 0.99,
            input_scaling=1.0 if linear else 0.01,
            input_connectivity=1.0,
            seed=seed,
        )
        states = states_of(reservoir.to(dtype), u)
        readout = Ridge(units, longest, 1e-12).fit(states[washout:-test], past[washout:-test])
        predicted = readout(states[-test:])
        recalled = torch.tensor(
            [
                memory_capacity(predicted[:, k : k + 1], past[-test:, k : k + 1])
                for k in range(longest)
            ]
        )
        ideal = (torch.arange(longest) < units).double()
        return Figures({"capacity": float(recalled.sum())}, ideal[:, None], recalled[:, None])

    return run


def cases(quick: bool) -> list[Case]:
    """Every task at every size; quick: the smallest of each."""
    found = [
        Case("NARMA-10", 100, narma, {"NMSE": 0.062}),
        Case("NARMA-10", 500, narma, {"NMSE": 0.0135}),
        Case("NARMA-10", 1000, narma, {"NMSE": 0.011}),
        Case("Mackey-Glass", 1000, mackey, {"one-step NRMSE": 1.2e-5, "log10 NRMSE84": -3.84}),
        Case("Lorenz", 500, lorenz_run, {"valid Lyapunov times": 10.2}, True),
        Case("Lorenz", 1000, lorenz_run, {"valid Lyapunov times": 11.5}, True),
        Case("capacity, linear ring", 100, capacity("ring", "identity"), {"capacity": 99.1}, True),
        Case("capacity, tanh ring", 100, capacity("ring", "tanh"), {"capacity": 76.0}, True),
        Case("capacity, tanh random", 100, capacity("random", "tanh"), {"capacity": 27.5}, True),
    ]
    if not quick:
        return found
    small = {c.task: Case(c.task, 60, c.run, c.anchors, c.greater_is_better) for c in found}
    return list(small.values())


def run_all(
    chosen: Sequence[Case], options: argparse.Namespace, console: Console
) -> list[list[Figures]]:
    """Every case with every seed, with a progress bar."""
    results: list[list[Figures]] = []
    size, dtype = 0.1 if options.quick else 1.0, getattr(torch, options.dtype)
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        job = bar.add_task("", total=len(chosen) * options.seeds)
        for case in chosen:
            found = []
            for seed in range(options.seeds):
                bar.update(job, description=f"{case.task} N={case.units}")
                found.append(case.run(case.units, seed, size, dtype))
                bar.advance(job)
            results.append(found)
    return results


def table_of(chosen: Sequence[Case], results: Sequence[Sequence[Figures]]) -> Table:
    """Ours beside the figure to hold it against."""
    table = Table(header_style="bold")
    for heading in ("task", "N", "figure", "here", "echo state network"):
        table.add_column(heading, justify="left" if heading in ("task", "figure") else "right")
    for case, runs in zip(chosen, results, strict=True):
        for name, anchor in case.anchors.items():
            middle, spread = mean_and_spread([run.values[name] for run in runs])
            better = middle >= anchor if case.greater_is_better else middle <= anchor
            table.add_row(
                case.task,
                str(case.units),
                name,
                f"[{'green' if better else 'yellow'}]{middle:.4g}[/] ± {spread:.1g}",
                f"{anchor:.4g}",
            )
    return table


def store(
    chosen: Sequence[Case],
    results: Sequence[Sequence[Figures]],
    options: argparse.Namespace,
    path: Path,
) -> None:
    """The figures of every seed, with the machine, its versions and the settings."""
    record = {
        "machine": machine.describe(),
        "settings": {"seeds": options.seeds, "dtype": options.dtype, "quick": options.quick},
        "tasks": [
            {
                "task": case.task,
                "units": case.units,
                "figure": name,
                "by_seed": [run.values[name] for run in runs],
                "mean_and_spread": mean_and_spread([run.values[name] for run in runs]),
                "echo_state_network": anchor,
                "greater_is_better": case.greater_is_better,
            }
            for case, runs in zip(chosen, results, strict=True)
            for name, anchor in case.anchors.items()
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def plot(chosen: Sequence[Case], results: Sequence[Sequence[Figures]], folder: Path) -> list[Path]:
    """A PNG a task, of its largest reservoir and first seed."""
    folder.mkdir(parents=True, exist_ok=True)
    largest = {case.task: (case, runs[0]) for case, runs in zip(chosen, results, strict=True)}
    paths = []
    for task, (case, run) in largest.items():
        figure = Figure(figsize=(8, 3), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        recalls, chaos = task.startswith("capacity"), task == "Lorenz"
        shown = 250 if task == "NARMA-10" else len(run.wanted)
        steps = torch.arange(1, shown + 1)[: len(run.wanted)]
        across = steps * (LORENZ_STEP * LORENZ_EXPONENT if chaos else 1.0)
        label = "all that N units can hold" if recalls else "true"
        axes.plot(across, run.wanted[:shown], color="#9aa5b1", linewidth=2.5, label=label)
        axes.plot(across, run.predicted[:shown], color="#0f766e", linewidth=1, label="reservoir")
        axes.set_xlabel("delay (steps)" if recalls else "Lyapunov times" if chaos else "step")
        axes.set_ylabel(
            "squared correlation" if recalls else "x, standardised" if chaos else "output"
        )
        axes.margins(x=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        figures = ", ".join(f"{name} {value:.3g}" for name, value in run.values.items())
        axes.set_title(f"{task}, N = {case.units}: {figures}", loc="left", fontsize=10)
        # Beside the curves: they fill the whole height.
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        name = task.lower().replace(", ", "-").replace(" ", "-")
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the tasks, print the table and write the plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reports/reservoir_tasks"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--task", default="", help="only tasks whose name contains this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store every seed's figures")
    parser.add_argument("--quick", action="store_true", help="60 units and a tenth of the data")
    options = parser.parse_args(arguments)
    console = Console()
    chosen = [case for case in cases(options.quick) if options.task.lower() in case.task.lower()]
    if not chosen or options.seeds < 1:
        parser.error("--task must be part of a task's name, and --seeds at least 1")
    results = run_all(chosen, options, console)
    console.print(table_of(chosen, results))
    if options.json is not None:
        store(chosen, results, options, options.json)
        console.print(f"stored: {options.json}")
    for path in plot(chosen, results, options.out):
        console.print(f"plot: {path}")


if __name__ == "__main__":
    main()

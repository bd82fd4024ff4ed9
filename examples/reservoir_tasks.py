"""Four standard reservoir tasks, compared with published figures and with ReservoirPy.

    python examples/reservoir_tasks.py --out reports/reservoir_tasks --peer reservoirpy

NARMA-10 (a nonlinear system of memory 10), Mackey-Glass with delay 17 (a chaotic series: the next
step, and 84 steps of free-running prediction), Lorenz (how long a free-running prediction stays
valid) and memory capacity (how many past inputs one state encodes). Figures are means over seeds
with sample standard deviations; `--json` stores those of every seed. `--peer reservoirpy` also runs
ReservoirPy on the same series, with the settings of its first example and with those used here.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from reservoir_networks import OURS, Contender, Kernels, Settings, ours, reservoirpy
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from resformer_kernels.bench import machine
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

LORENZ_STEP = 0.02
"""Time between two samples."""


@dataclass(frozen=True)
class Figures:
    """The result of one run of a task: its figures by name, and two curves to plot."""

    values: dict[str, float]
    wanted: Tensor
    predicted: Tensor


Run = Callable[[int, int, float, Contender], Figures]


@dataclass(frozen=True)
class Case:
    """A task at one size, and the figures to compare with."""

    task: str
    units: int
    run: Run
    anchors: dict[str, float]
    greater_is_better: bool = False
    peers: bool = True
    """Whether ReservoirPy has such a reservoir."""


def fit(states: Tensor, targets: Tensor, held_out: int, strengths: Sequence[float]) -> Ridge:
    """A readout fitted to all rows, with the strength that is best on the last `held_out`."""
    readout = Ridge(states.shape[1], targets.shape[1], strengths)
    readout.fit(states[:-held_out], targets[:-held_out])
    readout.select(states[-held_out:], targets[-held_out:])
    chosen = strengths.index(readout.strength or strengths[0])
    return readout.update(states[-held_out:], targets[-held_out:]).solve().take(chosen)


# Settings and lengths were chosen on the series of seeds 100 to 107. Nearly linear reservoirs fit
# NARMA-10 best; with fewer units, less linear ones do.
NARMA_FEW: Settings = {"sr": 0.9, "input_scaling": 0.05, "bias_scaling": 0.2}
NARMA_MANY: Settings = {"sr": 0.92, "input_scaling": 0.015, "bias_scaling": 0.1}
MACKEY_GLASS: Settings = {"sr": 1.0, "lr": 0.6, "input_scaling": 1.0, "bias_scaling": 0.3}
LORENZ: Settings = {"sr": 0.6, "lr": 1.0, "input_scaling": 0.2, "bias_scaling": 1.0}


def narma(units: int, seed: int, size: float, contender: Contender) -> Figures:
    """NARMA-10: NMSE on held-out steps."""
    train, test, washout = round(8000 * size), round(2000 * size), 200
    u, y = narma10(washout + train + test, seed=seed)
    settings = NARMA_FEW if units < 300 else NARMA_MANY
    states = contender.make(units, 1, seed, settings).states(u)
    strengths = contender.strengths
    readout = fit(states[washout:-test], y[washout:-test], train // 5, strengths)
    predicted = readout(states[-test:])
    return Figures({"NMSE": nmse(predicted, y[-test:])}, y[-test:], predicted)


def mackey(units: int, seed: int, size: float, contender: Contender) -> Figures:
    """Mackey-Glass: one-step NRMSE, and that of the 84th free-running step, over 50 starts."""
    train, test, washout, starts = round(10000 * size), round(3000 * size), 500, 50
    x = mackey_glass(washout + train + test + 1, seed=seed) - 0.93
    network = contender.make(units, 1, seed, MACKEY_GLASS)
    states, targets, end = network.states(x[:-1]), x[1:], washout + train
    readout = fit(states[washout:end], targets[washout:end], train // 5, contender.strengths)
    one_step = nrmse(readout(states[end:]), targets[end:])
    first = torch.linspace(end, end + test - 85, starts).long()
    outputs = network.free_run(readout, states[first], 84)
    wanted = targets[first + 83]
    spread = float(targets.std())
    far = float((outputs[:, 83] - wanted).square().mean().sqrt()) / spread
    shown = targets[int(first[0]) : int(first[0]) + 84]
    return Figures(
        {"one-step NRMSE": one_step, "log10 NRMSE84": math.log10(far)}, shown, outputs[0]
    )


def lorenz_run(units: int, seed: int, size: float, contender: Contender) -> Figures:
    """Lorenz: median valid time of 20 free-running predictions, in Lyapunov times."""
    step, train, washout, starts = LORENZ_STEP, round(8000 * size), 200, 20
    steps = math.ceil(20 / (LORENZ_EXPONENT * step))
    x = lorenz(washout + train + 100 * starts + steps + 1, step=step, seed=seed)
    mean, spread = x[:train].mean(0), x[:train].std()
    x = (x - mean) / spread
    network = contender.make(units, 3, seed, LORENZ)
    states, end = network.states(x[:-1]), washout + train
    targets = x[washout + 1 : end + 1]
    readout = fit(states[washout:end], targets, train // 5, contender.strengths)
    first = end + 100 * torch.arange(starts)
    outputs = network.free_run(readout, states[first], steps)
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
    """Memory capacity of a ring or a random reservoir.

    A linear ring of N units and spectral radius s encodes the inputs of k and of k + N steps ago in
    the same direction, so the input of k < N steps ago is read with a squared correlation of
    1 / (1 + s^2N), which is 1 to nine digits at s = 0.9. All delays from 1 then sum to N - 1, and
    chance adds about 1 / `test` for each further delay.
    """

    def run(units: int, seed: int, size: float, contender: Contender) -> Figures:
        train, test, washout = round(30000 * size), round(10000 * size), 10 * units
        longest = 2 * units
        u, past = delays(washout + train + test, longest, seed=seed)
        linear = activation == "identity"
        reservoir = Reservoir(
            units,
            1,
            topology=topology,
            activation=activation,
            sr=0.9 if linear else 0.99,
            input_scaling=1.0 if linear else 0.01,
            input_connectivity=1.0,
            seed=seed,
        )
        if linear:
            # A linear ring encodes as many inputs as its input weights have nonzero Fourier modes
            # round the ring. Weights of ±1 sometimes lack one, such as the mean.
            generator = torch.Generator().manual_seed(seed)
            reservoir.input_weight.uniform_(-1, 1, generator=generator)
        states = Kernels(reservoir, contender.dtype).states(u)
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
    """Every task at every size; with `quick`, each at 60 units."""
    found = [
        Case("NARMA-10", 100, narma, {"NMSE": 0.062}),
        Case("NARMA-10", 500, narma, {"NMSE": 0.0135}),
        Case("NARMA-10", 1000, narma, {"NMSE": 0.011}),
        Case("Mackey-Glass", 1000, mackey, {"one-step NRMSE": 1.2e-5, "log10 NRMSE84": -3.84}),
        Case("Lorenz", 500, lorenz_run, {"valid Lyapunov times": 10.2}, True),
        Case("Lorenz", 1000, lorenz_run, {"valid Lyapunov times": 11.5}, True),
    ]
    for name, topology, activation, anchor in (
        ("linear ring", "ring", "identity", 99.1),
        ("tanh ring", "ring", "tanh", 76.0),
        ("tanh random", "random", "tanh", 27.5),
    ):
        run, anchors = capacity(topology, activation), {"capacity": anchor}
        found.append(Case(f"capacity, {name}", 100, run, anchors, True, peers=False))
    if not quick:
        return found
    return list({case.task: replace(case, units=60) for case in found}.values())


@dataclass(frozen=True)
class Result:
    """The runs of one case, one per seed, by contender: first ours, then its peers'."""

    case: Case
    runs: dict[str, list[Figures]]


def run_all(chosen: Sequence[Case], options: argparse.Namespace, console: Console) -> list[Result]:
    """Run every case with every contender and seed, with a progress bar."""
    contenders = [ours(getattr(torch, options.dtype), options.fold)]
    others = reservoirpy() if options.peer else []
    size = 0.1 if options.quick else 1.0
    jobs = [(case, [*contenders, *(others if case.peers else [])]) for case in chosen]
    results = []
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        job = bar.add_task("", total=sum(len(who) for _, who in jobs) * options.seeds)
        for case, who in jobs:
            runs: dict[str, list[Figures]] = {}
            for contender in who:
                bar.update(job, description=f"{case.task} N={case.units}, {contender.name}")
                for seed in range(options.seeds):
                    found = case.run(case.units, seed, size, contender)
                    runs.setdefault(contender.name, []).append(found)
                    bar.advance(job)
            results.append(Result(case, runs))
    return results


def table_of(results: Sequence[Result]) -> Table:
    """A table of our figures, the published ones and the peers'."""
    others = list(dict.fromkeys(name for r in results for name in r.runs if name != OURS))
    table = Table(header_style="bold")
    for heading in ("task", "N", "figure", OURS, "echo state network", *others):
        table.add_column(heading, justify="left" if heading in ("task", "figure") else "right")
    for result in results:
        case = result.case
        for name, anchor in case.anchors.items():
            cells = {}
            for who, runs in result.runs.items():
                middle, spread = mean_and_spread([run.values[name] for run in runs])
                shown = f"{middle:.4g}"
                if who == OURS:
                    better = middle >= anchor if case.greater_is_better else middle <= anchor
                    shown = f"[{'green' if better else 'yellow'}]{shown}[/]"
                cells[who] = f"{shown} ± {spread:.1g}"
            peers = [cells.get(who, "") for who in others]
            row = (case.task, str(case.units), name, cells[OURS], f"{anchor:.4g}", *peers)
            table.add_row(*row)
    return table


def store(results: Sequence[Result], options: argparse.Namespace, path: Path) -> None:
    """Store the figures of every seed with the machine, its versions and the settings."""
    tasks = []
    for result in results:
        case = result.case
        for name, anchor in case.anchors.items():
            scores: dict[str, dict[str, Any]] = {}
            for who, runs in result.runs.items():
                found = [run.values[name] for run in runs]
                scores[who] = {"by_seed": found, "mean_and_spread": mean_and_spread(found)}
            tasks.append(
                {
                    "task": case.task,
                    "units": case.units,
                    "figure": name,
                    **scores.pop(OURS),
                    "echo_state_network": anchor,
                    "greater_is_better": case.greater_is_better,
                    "peers": scores,
                }
            )
    names = "seeds", "dtype", "fold", "quick", "peer"
    settings = {name: getattr(options, name) for name in names}
    record = {"machine": machine.describe(), "settings": settings, "tasks": tasks}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def plot(results: Sequence[Result], folder: Path) -> list[Path]:
    """One PNG per task, of its largest reservoir and first seed."""
    folder.mkdir(parents=True, exist_ok=True)
    largest = {result.case.task: (result.case, result.runs[OURS][0]) for result in results}
    paths = []
    for task, (case, run) in largest.items():
        figure = Figure(figsize=(8, 3), layout="constrained")
        axes = figure.add_subplot()
        recalls, chaos = task.startswith("capacity"), task == "Lorenz"
        shown = 250 if task == "NARMA-10" else len(run.wanted)
        steps = torch.arange(1, shown + 1)[: len(run.wanted)]
        across = steps * (LORENZ_STEP * LORENZ_EXPONENT if chaos else 1.0)
        label = "the most that N units can hold" if recalls else "true"
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
        # Outside the axes, whose whole height the curves fill.
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
    parser.add_argument("--fold", action="store_true", help="fold readouts into W to forecast")
    parser.add_argument("--task", default="", help="only tasks whose name contains this")
    parser.add_argument("--peer", choices=("reservoirpy",), help="also run it on the same series")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store every seed's figures")
    parser.add_argument("--quick", action="store_true", help="60 units and a tenth of the data")
    options = parser.parse_args(arguments)
    console = Console()
    chosen = [case for case in cases(options.quick) if options.task.lower() in case.task.lower()]
    if not chosen or options.seeds < 1:
        parser.error("--task must be part of a task's name, and --seeds at least 1")
    try:
        results = run_all(chosen, options, console)
    except ModuleNotFoundError as missing:
        parser.error(str(missing))
    console.print(table_of(results))
    if options.json is not None:
        store(results, options, options.json)
        console.print(f"stored: {options.json}")
    for path in plot(results, options.out):
        console.print(f"plot: {path}")


if __name__ == "__main__":
    main()

"""The demo's parts in order, within its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from resformer_kernels.bench.attention import AttentionBenchmark
from resformer_kernels.bench.ceilings import gemm_rates
from resformer_kernels.bench.tables import duration, speed_table
from resformer_kernels.bench.timing import measure
from resformer_kernels.cli.verify import summary_table, verdict_table
from resformer_kernels.demo import training, writing
from resformer_kernels.demo.record import Record
from resformer_kernels.demo.report import RANKS_NOTHING, write_report
from resformer_kernels.models import LanguageModel
from resformer_kernels.testing.verification import checks, verify

_VERIFY_SHARE = 0.2
_TIME_SHARE = 0.25
_WRITE_SHARE = 0.05
_REPORT_SECONDS = 6.0
_DTYPES = (torch.float32, torch.bfloat16)
_SHAPES = ((8, 8, 8, 256, 64), (1, 16, 16, 2048, 64), (1, 16, 4, 2048, 64))
"""Batch, query heads, KV heads, length, head_dim."""

Part = Callable[["Demo"], None]


class Demo:
    """One run. `deadline` is in time.perf_counter's seconds."""

    def __init__(self, record: Record, folder: Path, console: Console) -> None:
        self.record = record
        self.folder = folder
        self.console = console
        self.start = time.perf_counter()
        self.deadline = self.start + 60 * record.minutes
        self.reserve = _REPORT_SECONDS
        self.models: dict[str, LanguageModel] = {}

    def run(self) -> Path:
        """Every part, each followed by a report of what there is; the report's path.

        Ctrl-C ends the part in progress and all that follow, and is noted in the record.
        """
        parts: dict[str, Part] = {
            "verification": _verify,
            "timing": _time,
            "training": _train,
            "generation": _generate,
        }
        for name, part in parts.items():
            try:
                part(self)
            except KeyboardInterrupt:
                self.record.interrupted_in = name
            path = self._write()
            if self.record.interrupted_in is not None:
                break
        return path

    def left(self) -> float:
        """Seconds until the last report must be begun."""
        return self.deadline - self.reserve - time.perf_counter()

    def progress(self) -> Progress:
        """A progress bar with room for a remark."""
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[remark]}", style="dim"),
            console=self.console,
            transient=True,
        )

    def _write(self) -> Path:
        begun = time.perf_counter()
        self.record.elapsed = begun - self.start
        path = write_report(self.record, self.folder)
        # The last report has twice the plots of the one before it.
        self.reserve = max(_REPORT_SECONDS, 2 * (time.perf_counter() - begun))
        return path


def _verify(demo: Demo) -> None:
    record = demo.record
    demo.console.rule("[bold]1. The kernels against float64", align="left")
    until = time.perf_counter() + _VERIFY_SHARE * demo.left()
    # By turns of dtype, so that a limit leaves none of them out.
    by_dtype: dict[str, int] = {}
    ranked = []
    for check in checks():
        by_dtype[check.dtype] = rank = by_dtype.get(check.dtype, 0) + 1
        ranked.append((rank, check))
    table = [check for _, check in sorted(ranked, key=lambda pair: pair[0])]
    record.cases_planned = len(table)
    with demo.progress() as progress:
        task = progress.add_task("verifying", total=len(table), remark="")
        for verdicts in verify(table):
            record.verdicts += verdicts
            record.cases_checked += 1
            progress.advance(task)
            if time.perf_counter() > until:
                break
    demo.console.print(summary_table(record.verdicts))
    if record.failed:
        demo.console.print(verdict_table(record.failed, "Over budget"))
    outcome = (
        f"[bold red]{len(record.failed)} over budget"
        if record.failed
        else "[bold green]all within budget"
    )
    demo.console.print(
        f"{len(record.verdicts)} tensors of {record.cases_checked} cases "
        f"({record.cases_planned} planned): {outcome}\n"
    )


def _time(demo: Demo) -> None:
    record = demo.record
    demo.console.rule("[bold]2. Mixing and attention against torch's SDPA", align="left")
    until = time.perf_counter() + _TIME_SHARE * demo.left()
    benchmarks = [
        AttentionBenchmark(*shape, dtype, direction)
        for shape in _SHAPES
        for direction in ("forward", "backward")
        for dtype in _DTYPES
    ]
    record.benchmarks_planned = len(benchmarks)
    with demo.progress() as progress:
        task = progress.add_task("timing", total=len(benchmarks) + 1, remark="GEMM")
        record.gemm = gemm_rates(_DTYPES)
        progress.advance(task)
        for benchmark in benchmarks:
            progress.update(task, remark=benchmark.name)
            record.results.append(measure(benchmark, min_sample_s=0.02))
            progress.advance(task)
            if time.perf_counter() > until:
                break
    demo.console.print(speed_table(record.results, record.gemm))
    demo.console.print(
        f"{len(record.results)} of {record.benchmarks_planned} cases fitted the time\n"
    )


def _train(demo: Demo) -> None:
    record = demo.record
    demo.console.rule("[bold]3. Three byte-level models of equal size", align="left")
    corpus = record.corpus
    demo.console.print(
        f"{corpus.source}: {len(corpus.train) / 1e6:.1f} MB to train on, "
        f"{len(corpus.held_out) / 1e6:.1f} MB held out"
    )
    seconds = max(1.0, (1 - _WRITE_SHARE) * demo.left())
    start = time.perf_counter()
    with demo.progress() as progress:
        task = progress.add_task("training", total=1.0, remark="")

        def show(state: training.Progress) -> None:
            bits = ", ".join(
                f"{run.name} {run.curve[-1][1]:.3f}" for run in record.runs if run.curve
            )
            progress.update(
                task, completed=state.share, remark=f"{state.steps} steps of each; {bits}"
            )

        try:
            demo.models = training.train(corpus, record.plan, seconds, record.runs, show)
        finally:
            record.training_seconds = time.perf_counter() - start
    demo.console.print(_model_table(record))
    demo.console.print(f"[bold]{RANKS_NOTHING}\n")


def _generate(demo: Demo) -> None:
    record = demo.record
    demo.console.rule("[bold]4. Text from the cache", align="left")
    seconds = max(0.0, demo.left())
    with demo.progress() as progress:
        task = progress.add_task("generating", total=1.0, remark="")
        writing.write(
            demo.models,
            record.corpus,
            seconds,
            record.writings,
            lambda share: progress.update(task, completed=share),
        )
    for one in record.writings:
        if one.name == "SVFormer":
            demo.console.print(one.prompt, style="dim", end="", markup=False, highlight=False)
            demo.console.print(one.text, markup=False, highlight=False)
    demo.console.print(_cache_table(record))
    demo.console.print()


def _cache_table(record: Record) -> Table:
    table = Table(header_style="bold")
    table.add_column("model")
    for heading in ("tokens a second", "cache of one sequence"):
        table.add_column(heading, justify="right")
    for one in record.writings:
        table.add_row(one.name, f"{one.tokens_per_second:,.0f}", f"{one.cache_bytes:,} bytes")
    return table


def _model_table(record: Record) -> Table:
    table = Table(header_style="bold")
    table.add_column("model")
    headings = ("parameters", "steps", "held-out bits per byte", "step time", "activation memory")
    for heading in headings:
        table.add_column(heading, justify="right")
    for run in record.runs:
        error = f" ± {run.final_error:.3f}" if run.final_error is not None else ""
        table.add_row(
            run.name,
            f"{run.parameters:,}",
            str(run.steps),
            f"{run.latest_bits or float('nan'):.3f}{error}",
            duration(run.median_step or 0.0),
            f"{run.activation_bytes / 2**20:.1f} MiB",
        )
    return table

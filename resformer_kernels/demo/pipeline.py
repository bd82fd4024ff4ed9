"""The demo's parts in order, within its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import chain, product, zip_longest
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

from resformer_kernels.bench.attention import AttentionBenchmark
from resformer_kernels.bench.ceilings import gemm_rates
from resformer_kernels.bench.tables import speed_table, summary_table, verdict_table
from resformer_kernels.bench.timing import measure
from resformer_kernels.demo import training, writing
from resformer_kernels.demo.record import Record
from resformer_kernels.demo.report import RANKS_NOTHING, cache_table, model_table, write_report
from resformer_kernels.models import LanguageModel
from resformer_kernels.testing.verification import Check, checks, verify

_VERIFY_SHARE = 0.2
_TIME_SHARE = 0.25
_WRITE_SHARE = 0.05
_REPORT_SECONDS = 6.0
_DTYPES = (torch.float32, torch.bfloat16)
_SHAPES = ((8, 8, 8, 256, 64), (1, 16, 16, 2048, 64), (1, 16, 4, 2048, 64))
"""Batch, query heads, KV heads, length, head_dim."""


class Demo:
    """One run of all parts, which fills a record and writes its report."""

    def __init__(self, record: Record, folder: Path, console: Console) -> None:
        self.record = record
        self.folder = folder
        self.console = console
        self.start = time.perf_counter()
        self.reserve = _REPORT_SECONDS
        self.models: dict[str, LanguageModel] = {}

    def run(self) -> Path:
        """Run every part, each followed by a report so far; the report's path.

        Ctrl-C ends the part in progress and skips the others; the record names the part.
        """
        for number, (name, (title, part)) in enumerate(_PARTS.items(), 1):
            self.console.rule(f"[bold]{number}. {title}", align="left")
            try:
                with self._progress() as self._bar:
                    self._bar.add_task(name, total=1.0, remark="")
                    part(self)
            except KeyboardInterrupt:
                self.record.interrupted_in = name
            path = self._write()
            if self.record.interrupted_in is not None:
                break
        return path

    def left(self) -> float:
        """Seconds until the last report must begin."""
        return self.start + 60 * self.record.minutes - self.reserve - time.perf_counter()

    def show(self, share: float, remark: str = "") -> None:
        """Show how much of the current part is done."""
        self._bar.update(self._bar.task_ids[-1], completed=share, remark=remark)

    def _progress(self) -> Progress:
        remark = TextColumn("{task.fields[remark]}", style="dim")
        columns = (*Progress.get_default_columns(), remark)
        return Progress(*columns, console=self.console, transient=True)

    def _write(self) -> Path:
        begun = time.perf_counter()
        self.record.elapsed = begun - self.start
        path = write_report(self.record, self.folder)
        # The last report has twice as many plots as the one before it.
        self.reserve = max(_REPORT_SECONDS, 2 * (time.perf_counter() - begun))
        return path


def _verify(demo: Demo) -> None:
    record = demo.record
    until = time.perf_counter() + _VERIFY_SHARE * demo.left()
    by_dtype: dict[str, list[Check]] = {}
    for check in checks():
        by_dtype.setdefault(check.dtype, []).append(check)
    # Dtypes take turns, so that a limit leaves none of them out.
    turns = chain.from_iterable(zip_longest(*by_dtype.values()))
    planned = [check for check in turns if check is not None]
    record.cases_planned = len(planned)
    for verdicts in verify(planned):
        record.verdicts += verdicts
        record.cases_checked += 1
        demo.show(record.cases_checked / len(planned))
        if time.perf_counter() > until:
            break
    demo.console.print(summary_table(record.verdicts))
    if record.failed:
        demo.console.print(verdict_table(record.failed, "Over budget"))
    outcome = f"[bold red]{len(record.failed)}[/]" if record.failed else "[bold green]none[/]"
    demo.console.print(
        f"{len(record.verdicts)} tensors of {record.cases_checked} cases "
        f"({record.cases_planned} planned): {outcome} over budget\n"
    )


def _time(demo: Demo) -> None:
    record = demo.record
    until = time.perf_counter() + _TIME_SHARE * demo.left()
    benchmarks = [
        AttentionBenchmark(*shape, dtype, direction)
        for shape, direction, dtype in product(_SHAPES, ("forward", "backward"), _DTYPES)
    ]
    record.benchmarks_planned = len(benchmarks)
    demo.show(0.0, "GEMM")
    record.gemm = gemm_rates(_DTYPES)
    for done, benchmark in enumerate(benchmarks):
        demo.show((done + 1) / (len(benchmarks) + 1), benchmark.name)
        record.results.append(measure(benchmark, min_sample_s=0.02))
        if time.perf_counter() > until:
            break
    demo.console.print(speed_table(record.results, record.gemm))
    demo.console.print(
        f"{len(record.results)} of {record.benchmarks_planned} cases fitted the time\n"
    )


def _train(demo: Demo) -> None:
    record, corpus = demo.record, demo.record.corpus
    demo.console.print(
        f"{corpus.source}: {len(corpus.train) / 1e6:.1f} MB to train on, "
        f"{len(corpus.held_out) / 1e6:.1f} MB held out"
    )

    def show(share: float, steps: int) -> None:
        bits = ", ".join(f"{run.name} {run.latest_bits:.3f}" for run in record.runs)
        demo.show(share, f"{steps} steps of each; {bits}")

    seconds = max(1.0, (1 - _WRITE_SHARE) * demo.left())
    demo.models = training.train(corpus, record.plan, seconds, record.runs, show)
    demo.console.print(model_table(record.runs))
    demo.console.print(f"[bold]{RANKS_NOTHING}\n")


def _generate(demo: Demo) -> None:
    writings = demo.record.writings
    seconds = max(0.0, demo.left())
    writing.write(demo.models, demo.record.corpus, seconds, writings, demo.show)
    shown = writings[-1]
    demo.console.print(shown.prompt, style="dim", end="", markup=False, highlight=False)
    demo.console.print(shown.text, markup=False, highlight=False)
    demo.console.print(cache_table(writings))
    demo.console.print()


_PARTS: dict[str, tuple[str, Callable[[Demo], None]]] = {
    "verification": ("The kernels against float64", _verify),
    "timing": ("Mixing and attention against torch's SDPA", _time),
    "training": ("Three byte-level models of equal size", _train),
    "generation": ("Text from the cache", _generate),
}
"""Title and function of each part."""

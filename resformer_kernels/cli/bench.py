"""`resformer-kernels bench`: time every registered case against its peers."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.peak_memory import SDPA
from resformer_kernels.bench import timing
from resformer_kernels.bench.timing import MIN_SAMPLES, OURS, Benchmark
from resformer_kernels.cli import COMMANDS, INTERRUPTED, Subparsers, checkout
from resformer_kernels.cli.common import NO_CHECKOUT, Meter, at_least, output, refuse

_SAMPLE_SECONDS, _QUICK_SAMPLE_SECONDS = 0.1, 0.02
_MODULES = ("registry", "runner", "record", "report", "compare")
_NO_EXTRA = "{} is missing: pip install 'resformer-kernels[bench]'"
_MEMORY_CASE = "peak memory forward backward bfloat16"
_MEMORY_COST = 5.0


def add_parser(subparsers: Subparsers) -> None:
    """Declare the arguments of `bench`."""
    parser = subparsers.add_parser(
        "bench",
        help=COMMANDS["bench"],
        description="Time every case of benchmarks/ against every peer that is installed, "
        "alternating in one process, with the machine's GEMM rate and bandwidth measured in the "
        "same run, and store and draw the result. Runs from a checkout of the repository. The exit "
        "code is 1 where --compare finds a case slower, or a tensor is over its error budget.",
    )
    chosen = parser.add_argument_group("what is timed")
    chosen.add_argument(
        "--suite",
        choices=("attention", "window", "mix", "decode", "scan", "reservoir"),
        help="only the cases of one kind",
    )
    chosen.add_argument(
        "--peer",
        metavar="NAME",
        nargs="+",
        help="only peers whose name contains one of these, and cases that have one",
    )
    chosen.add_argument(
        "--filter",
        metavar="TEXT",
        action="append",
        help="only cases whose name has every word of TEXT; repeated: any of them",
    )
    chosen.add_argument("--quick", action="store_true", help="short cases, no compiling")
    chosen.add_argument(
        "--list", action="store_true", help="print the names of cases and peers and stop"
    )
    chosen.add_argument(
        "--samples",
        type=at_least(MIN_SAMPLES),
        default=MIN_SAMPLES,
        help="timed samples of ours and of each peer (default: %(default)s)",
    )
    chosen.add_argument(
        "--threads",
        type=at_least(1),
        help="threads that torch and the kernels use (default: torch's own choice)",
    )
    chosen.add_argument(
        "--from",
        dest="stored",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="time nothing: show, compare or draw these stored runs",
    )
    results = parser.add_argument_group("what becomes of it")
    results.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="store the run here (default, if every case is timed: "
        "reports/bench-DATE-TIME/run.json)",
    )
    results.add_argument(
        "--compare",
        type=Path,
        metavar="FILE",
        help="name the cases that are slower than in this stored run by more than the spread of "
        "both",
    )
    results.add_argument(
        "--html",
        type=Path,
        metavar="DIR",
        help="write DIR/index.html, one page that needs nothing else, and its figures in "
        "DIR/figures (default, if every case is timed: reports/bench-DATE-TIME)",
    )


def run(args: argparse.Namespace) -> int:
    """Time, print, store. 0; 1 where something is slower or wrong, 2 for what cannot be done."""
    _choose_outputs(args)
    for package in ("pytest_benchmark", *(("matplotlib",) if args.html else ())):
        if importlib.util.find_spec(package) is None:
            return refuse("bench", _NO_EXTRA.format(package))
    suite = checkout(*_MODULES)
    if suite is None:
        return refuse("bench", NO_CHECKOUT)
    bench = _Bench(args, *suite)
    if args.list:
        return bench.list()
    try:
        stored = bench.record.load(args.compare) if args.compare else None
        runs = [bench.record.load(path) for path in args.stored or ()]
    except bench.record.UnreadableError as error:
        return refuse("bench", str(error))
    if not args.stored:
        if not bench.cases and not bench.memory:
            return refuse("bench", "no such case or peer; --list prints the names")
        runs = [bench.measure(stored)]
    code = bench.tell(runs, stored)
    return INTERRUPTED if bench.interrupted else code


def _choose_outputs(args: argparse.Namespace) -> None:
    """A run of every case is stored and drawn, though nobody says where."""
    if any((args.list, args.quick, args.filter, args.suite, args.peer, args.stored)):
        return
    folder = Path("reports") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    args.json = args.json or folder / "run.json"
    args.html = args.html or folder


class _Bench:
    """One call of the command."""

    def __init__(
        self,
        args: argparse.Namespace,
        registry: ModuleType,
        runner: ModuleType,
        record: ModuleType,
        report: ModuleType,
        compare: ModuleType,
    ) -> None:
        self.args = args
        self.registry, self.runner, self.record = registry, runner, record
        self.report, self.compare = report, compare
        self.cases: list[Benchmark] = [
            case
            for case in registry.cases(quick=args.quick)
            if _matches(case.name, args.filter)
            and args.suite in (None, case.group.split()[0])
            and (args.peer is None or timing.wanted(list(case.makers()), args.peer))
        ]
        self.lengths: tuple[int, ...] = registry.memory_lengths(quick=args.quick)
        whole = args.suite is None and args.peer is None
        self.memory = whole and _matches(_MEMORY_CASE, args.filter)
        self.seconds = _QUICK_SAMPLE_SECONDS if args.quick else _SAMPLE_SECONDS
        self.interrupted = False

    def list(self) -> int:
        """Print the names of what would run."""
        for case in self.cases:
            peers = timing.wanted(list(case.makers()), self.args.peer)
            print(f"{case.name}  [{', '.join(peers)}]")
        if self.memory:
            print(f"peak memory at T {', '.join(map(str, self.lengths))}  [{SDPA}]")
        return 0

    def measure(self, stored: Any) -> Any:
        """A new run; what looks slower than `stored` is timed twice. Ctrl-C ends it early."""
        args, contestants = self.args, (OURS, SDPA)
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        costs = [1.0, *map(self._cost, self.cases), 2.0]
        if self.memory:
            costs += [_MEMORY_COST] * len(self.lengths) * len(contestants)
        with Meter(costs) as meter:
            meter.begin("ceilings")
            found = self.runner.start(self.registry.DTYPES, args.samples)
            try:
                self._fill(found, stored, contestants, meter)
            except KeyboardInterrupt:
                self.interrupted = True
        if self.interrupted:
            print("interrupted; what was found is kept", file=sys.stderr)
        return found

    def _fill(self, found: Any, stored: Any, contestants: Sequence[str], meter: Meter) -> None:
        settings = self.runner.Settings(self.args.samples, self.seconds, self.args.peer)
        self.runner.time_cases(found, self.cases, settings, on_case=meter.begin)
        suites = {case.group.split()[0] for case in self.cases}
        ops = [op for suite in suites for op in self.registry.SUITES.get(suite, ())]
        self.runner.measure_errors(found, ops, on_case=meter.begin)
        if self.memory:
            self.runner.measure_memory(
                found,
                self.lengths,
                self.registry.DTYPES[:1],
                contestants,
                heads=self.registry.MEMORY_HEADS,
                head_dim=self.registry.MEMORY_HEAD_DIM,
                on_case=meter.begin,
            )
        if stored is not None:
            for change in self.compare.slower(self.compare.compare(found, stored)):
                case = next(case for case in self.cases if case.name == change.name)
                self.runner.time_again(found, case, settings, on_case=meter.begin)

    def tell(self, runs: Sequence[Any], stored: Any) -> int:
        """Print, store, compare and draw; the exit code."""
        args, console = self.args, output(150)
        for found in runs:
            self.report.print_run(found, console)
        if args.json and not args.stored:
            self.record.store(runs[0], args.json)
            console.print(f"stored: [bold]{args.json}", soft_wrap=True)
        if args.html:
            page = checkout("page")
            assert page is not None
            path = page[0].write(runs, args.html)
            console.print(f"report: [bold]{path}", soft_wrap=True)
        failed = any(not verdict.ok for found in runs for verdict in found.errors)
        if stored is None:
            return int(failed)
        changes = [c for found in runs for c in self.compare.compare(found, stored)]
        if not changes:
            return refuse("bench", f"{args.compare} has none of these cases")
        self.report.print_changes(changes, console)
        return int(failed or bool(self.compare.slower(changes)))

    def _cost(self, case: Benchmark) -> float:
        """About what a case takes, from what a slow peer makes of its bytes and FLOPs."""
        once = max(self.seconds, case.bytes / 4e9, case.flops / 1e11)
        return 1.0 + len(case.makers()) * (self.args.samples + 3) * once


def _matches(name: str, filters: Sequence[str] | None) -> bool:
    if not filters:
        return True
    return any(all(word in name for word in text.split()) for text in filters)

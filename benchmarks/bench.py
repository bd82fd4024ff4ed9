"""`resformer-kernels bench`: choose cases, time them, print, store, compare and draw the run.

`args` are the arguments of the command (`resformer_kernels/cli/bench.py`).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

import torch

from benchmarks import compare, record, registry, report, runner
from benchmarks.peak_memory import SDPA
from benchmarks.runner import Run
from resformer_kernels.bench.timing import OURS, Benchmark, wanted
from resformer_kernels.cli import INTERRUPTED
from resformer_kernels.cli.common import Meter, output, refuse

_SAMPLE_SECONDS, _QUICK_SAMPLE_SECONDS = 0.1, 0.02
_MEMORY_CASE = "peak memory forward backward bfloat16"
_MEMORY_COST = 5.0
_MEMORY_CONTESTANTS = (OURS, SDPA)


def run(args: Namespace) -> int:
    """Carry the command out; its exit code."""
    cases = [
        case
        for case in registry.cases(quick=args.quick)
        if _matches(case.name, args.filter)
        and args.suite in (None, case.group.split()[0])
        and (args.peer is None or wanted(list(case.makers()), args.peer))
    ]
    whole = args.suite is None and args.peer is None and _matches(_MEMORY_CASE, args.filter)
    lengths = registry.memory_lengths(quick=args.quick) if whole else ()
    if args.list:
        for case in cases:
            print(f"{case.name}  [{', '.join(wanted(list(case.makers()), args.peer))}]")
        if lengths:
            print(f"peak memory at T {', '.join(map(str, lengths))}  [{SDPA}]")
        return 0
    try:
        stored = record.load(args.compare) if args.compare else None
        runs = [record.load(path) for path in args.stored or ()]
    except record.UnreadableError as error:
        return refuse("bench", str(error))
    interrupted = False
    if not runs:
        if not cases and not lengths:
            return refuse("bench", "no such case or peer; --list prints the names")
        found, interrupted = _measure(args, cases, lengths, stored)
        runs = [found]
    code = _tell(args, runs, stored)
    return INTERRUPTED if interrupted else code


def _matches(name: str, filters: Sequence[str] | None) -> bool:
    return not filters or any(all(word in name for word in text.split()) for text in filters)


def _measure(
    args: Namespace, cases: Sequence[Benchmark], lengths: Sequence[int], stored: Run | None
) -> tuple[Run, bool]:
    """A new run, and whether Ctrl-C ended it early.

    A case that looks slower than in `stored` is timed twice.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    seconds = _QUICK_SAMPLE_SECONDS if args.quick else _SAMPLE_SECONDS
    settings = runner.Settings(args.samples, seconds, args.peer)
    costs = [1.0, *(_cost(case, settings) for case in cases), 2.0]
    costs += [_MEMORY_COST] * len(lengths) * len(_MEMORY_CONTESTANTS)
    with Meter(costs) as meter:
        meter.begin("ceilings")
        found = runner.start(registry.DTYPES, args.samples)
        try:
            runner.time_cases(found, cases, settings, on_case=meter.begin)
            suites = {case.group.split()[0] for case in cases}
            ops = [op for suite in suites for op in registry.SUITES.get(suite, ())]
            runner.measure_errors(found, ops, on_case=meter.begin)
            runner.measure_memory(
                found,
                lengths,
                registry.DTYPES[:1],
                _MEMORY_CONTESTANTS,
                heads=registry.MEMORY_HEADS,
                head_dim=registry.MEMORY_HEAD_DIM,
                on_case=meter.begin,
            )
            by_name = {case.name: case for case in cases}
            for change in compare.slower(compare.compare(found, stored)) if stored else ():
                runner.time_again(found, by_name[change.name], settings, on_case=meter.begin)
        except KeyboardInterrupt:
            print("interrupted; what was found is kept", file=sys.stderr)
            return found, True
    return found, False


def _cost(case: Benchmark, settings: runner.Settings) -> float:
    """About what a case takes, from what a slow peer makes of its bytes and FLOPs."""
    once = max(settings.min_sample_s, case.bytes / 4e9, case.flops / 1e11)
    return 1.0 + len(case.makers()) * (settings.samples + 3) * once


def _tell(args: Namespace, runs: Sequence[Run], stored: Run | None) -> int:
    """Print, store, compare and draw; the exit code."""
    console = output(150)
    for found in runs:
        report.print_run(found, console)
    if args.json and not args.stored:
        record.store(runs[0], args.json)
        console.print(f"stored: [bold]{args.json}", soft_wrap=True)
    if args.html:
        # matplotlib is needed here alone.
        from benchmarks import page

        console.print(f"report: [bold]{page.write(runs, args.html)}", soft_wrap=True)
    failed = any(not verdict.ok for found in runs for verdict in found.errors)
    if stored is None:
        return int(failed)
    changes = [change for found in runs for change in compare.compare(found, stored)]
    if not changes:
        return refuse("bench", f"{args.compare} has none of these cases")
    report.print_changes(changes, console)
    return int(failed or bool(compare.slower(changes)))

"""`resformer-kernels bench`: time every registered case against its peers."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from resformer_kernels.cli import COMMANDS, Subparsers, checkout
from resformer_kernels.cli.common import NO_CHECKOUT, at_least, counter, output, refuse
from resformer_kernels.testing.timing import MIN_SAMPLES

_SAMPLE_SECONDS, _QUICK_SAMPLE_SECONDS = 0.1, 0.02


def add_parser(subparsers: Subparsers) -> None:
    """Declare the arguments of `bench`."""
    parser = subparsers.add_parser(
        "bench",
        help=COMMANDS["bench"],
        description="Time every case of benchmarks/ against PyTorch, alternating in one process, "
        "with the machine's GEMM rate and bandwidth measured in the same run, and store the "
        "result. Runs from a checkout of the repository.",
    )
    parser.add_argument(
        "--filter",
        metavar="TEXT",
        action="append",
        help="only cases whose name has every word of TEXT; repeated: any of them",
    )
    parser.add_argument(
        "--suite",
        choices=("attention", "window", "mix", "decode", "scan", "reservoir"),
        help="only the cases of one kind; stored only with --out",
    )
    parser.add_argument("--quick", action="store_true", help="short cases; stored only with --out")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument(
        "--samples",
        type=at_least(MIN_SAMPLES),
        default=MIN_SAMPLES,
        help="timed samples of ours and of each peer (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=at_least(1),
        help="threads that torch and the kernels use (default: torch's own choice)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the JSON (default: benchmarks/results/<machine>.json; with --quick or --filter "
        "nothing is stored unless this is given)",
    )


def run(args: argparse.Namespace) -> int:
    """Time, print, store. 0; 2 where there is no registry or no case matches."""
    suite = checkout("registry", "runner", "report")
    if suite is None:
        return refuse("bench", NO_CHECKOUT)
    registry, runner, report = suite
    cases = [
        case
        for case in registry.cases(quick=args.quick)
        if _matches(case.name, args.filter) and args.suite in (None, case.group.split()[0])
    ]
    lengths = registry.memory_lengths(quick=args.quick)
    memory = args.suite is None and _matches("peak memory forward backward bfloat16", args.filter)
    if args.list:
        names = [case.name for case in cases]
        names += [f"peak memory at T {', '.join(map(str, lengths))}"] if memory else []
        print("\n".join(names))
        return 0
    if not cases and not memory:
        return refuse(
            "bench",
            f"no case matches --filter {' '.join(args.filter or [])}; --list prints the names",
        )
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    console = output(140)
    dtypes = registry.DTYPES
    memory_dtypes = dtypes[:1]
    with counter() as progress:
        total = 1 + len(cases) + (len(lengths) * len(memory_dtypes) if memory else 0)
        task = progress.add_task("ceilings", total=total)

        def on_case(name: str) -> None:
            progress.update(task, advance=1, description=name)

        found = runner.start(dtypes, args.samples)
        seconds = _QUICK_SAMPLE_SECONDS if args.quick else _SAMPLE_SECONDS
        runner.time_cases(found, cases, samples=args.samples, min_sample_s=seconds, on_case=on_case)
        if memory:
            runner.measure_memory(
                found,
                lengths,
                memory_dtypes,
                heads=registry.MEMORY_HEADS,
                head_dim=registry.MEMORY_HEAD_DIM,
                on_case=on_case,
            )
    report.print_run(found, console)
    if args.out is not None or not (args.quick or args.filter or args.suite):
        console.print(f"stored: [bold]{report.store(found, args.out)}", soft_wrap=True)
    return 0


def _matches(name: str, filters: list[str] | None) -> bool:
    if not filters:
        return True
    return any(all(word in name for word in text.split()) for text in filters)

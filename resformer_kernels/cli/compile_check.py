"""`resformer-kernels compile-check`: resources of every compiled kernel, without a GPU.

Triton kernels are compiled for each architecture; the CUDA library is read as it was built.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from rich.markup import escape

from resformer_kernels._triton.arch import ARCHITECTURES, label
from resformer_kernels.bench.machine import usable_cores
from resformer_kernels.bench.tables import markdown, pivot, table
from resformer_kernels.cli import COMMANDS, Subparsers
from resformer_kernels.cli.common import at_least, counter, output, refuse
from resformer_kernels.cli.compile import check, cuda
from resformer_kernels.cli.compile.artifacts import Compiled


def add_parser(subparsers: Subparsers) -> None:
    """Declare the arguments of `compile-check`."""
    parser = subparsers.add_parser(
        "compile-check",
        help=COMMANDS["compile-check"],
        description="Compile each Triton kernel in each of its configurations, specialised as its "
        "launcher would, and read registers, local memory, shared memory and matrix instructions "
        "from the machine code. Kernels of the CUDA library, where it is built, are read too. No "
        "GPU is needed. Exit code 1 where a kernel does not compile, a main configuration spills, "
        "shared memory is over the architecture's limit, a matrix product does not use wgmma on "
        "sm_90, threads may part before a barrier (it depends on a number that the program loads "
        "and stores with nothing between), or shared memory is written while another warp group "
        "may still multiply with it. The column 'ahead' has what runs between the nearest load by "
        "tensor descriptor in a loop and the wait for it: matrix products | PTX instructions.",
    )
    parser.add_argument(
        "--arch",
        type=int,
        action="append",
        choices=tuple(ARCHITECTURES),
        help="this architecture only; can be repeated (default: all)",
    )
    parser.add_argument("--op", metavar="OP", action="append", help="this op only, by its folder")
    fewer = parser.add_mutually_exclusive_group()
    fewer.add_argument("--main", action="store_true", help="main configurations only")
    fewer.add_argument(
        "--brief",
        action="store_true",
        help="main configurations, and the first one of kernels without any",
    )
    parser.add_argument("--filter", metavar="TEXT", default="", help="names with all words")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--jobs", type=at_least(1), default=usable_cores(), help="compiled at once")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep compiled kernels here and reuse them (default: a temporary folder)",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON instead of a table")
    form.add_argument("--markdown", action="store_true", help="print a Markdown table")


def run(args: argparse.Namespace) -> int:
    """Compile and print. 0; 1 where a case fails; 2 where nothing can be compiled."""
    reason = check.unavailable_reason()
    if reason is not None:
        return refuse("compile-check", reason)
    modules = check.case_modules()
    ops = [check.op_of(module) for module in modules]
    unknown = sorted(set(args.op or ()) - set(ops))
    if unknown:
        return refuse("compile-check", f"no Triton kernels in {unknown}; there are some in {ops}")
    ops, capabilities = args.op or ops, args.arch or tuple(ARCHITECTURES)

    def named(case: check.Job | Compiled) -> bool:
        return all(word in case.name for word in args.filter.split())

    modules = [module for module in modules if check.op_of(module) in ops]
    jobs = filter(named, check.jobs(modules, capabilities))
    wanted = [job for job in jobs if job.main or not args.main]
    if args.brief:
        wanted = brief(wanted)
    built = list(filter(named, cuda.kernels(ops, capabilities)))
    if not wanted and not built:
        return refuse("compile-check", "no case matches; --list prints the names")
    if args.list:
        listed: list[check.Job | Compiled] = [*wanted, *built]
        for case in listed:
            print(f"{label(case.capability)} {case.op}: {case.name}")
        return 0
    found = [*(_compile(wanted, args.cache, args.jobs) if wanted else ()), *built]
    if args.json:
        print(json.dumps([{**asdict(case), "ok": case.ok} for case in found], indent=1))
    elif args.markdown:
        print(as_markdown(found))
    else:
        _print_table(found)
    return 0 if all(case.ok for case in found) else 1


def brief(wanted: Sequence[check.Job]) -> list[check.Job]:
    """Main configurations, and the first one on each architecture of kernels without any."""

    def kernel(job: check.Job) -> tuple[str, int, str]:
        return job.op, job.capability, job.name.partition(",")[0]

    first = {kernel(job): job for job in reversed(wanted)}
    covered = {kernel(job) for job in wanted if job.main}
    return [
        job
        for job in wanted
        if job.main or (kernel(job) not in covered and first[kernel(job)] is job)
    ]


def _compile(wanted: Sequence[check.Job], cache: Path | None, workers: int) -> list[Compiled]:
    """Compile with a progress bar; results in the order of `wanted`."""
    order = {(job.op, job.capability, job.name): place for place, job in enumerate(wanted)}
    folder = tempfile.TemporaryDirectory() if cache is None else nullcontext(str(cache))
    with folder as kept, counter() as progress:
        Path(kept).mkdir(parents=True, exist_ok=True)
        running = check.check(wanted, Path(kept), min(workers, len(wanted)))
        found = list(progress.track(running, len(wanted), description="compiling"))
    return sorted(found, key=lambda case: order[case.op, case.capability, case.name])


def _print_table(found: Sequence[Compiled]) -> None:
    console = output(160)
    headings = (
        "op",
        "arch",
        "kernel",
        "threads",
        "registers",
        "local",
        "shared",
        "ahead",
        "matrix",
        "",
    )
    rows = [
        (
            case.op,
            label(case.capability),
            case.name,
            str(case.threads or ""),
            str(case.registers or ""),
            f"{case.local_bytes} B" if case.local_accesses else "",
            kibibytes(case.shared_bytes),
            _ahead(case),
            ", ".join(case.matrix),
            "[green]ok" if case.ok else f"[bold red]{escape('; '.join(case.problems))}",
        )
        for case in found
    ]
    console.print(table(headings, rows, right=headings[3:8], fold=("kernel", ""), group=2))
    spilling = sum(1 for case in found if case.local_accesses)
    failed = sum(not case.ok for case in found)
    verdict = f"[bold red]{failed} failed" if failed else "[bold green]all passed"
    main = sum(case.main for case in found)
    console.print(
        f"{len(found)} kernels compiled by Triton {triton_version()}, {main} of them main "
        f"configurations; {spilling} use local memory: {verdict}"
    )


def triton_version() -> str:
    """The version of the Triton that compiles."""
    import triton

    return str(triton.__version__)


def _ahead(case: Compiled) -> str:
    """Products and instructions between a tile's load by descriptor and the wait for it."""
    return "" if case.ahead is None else f"{case.ahead.products} | {case.ahead.instructions}"


def kibibytes(count: int) -> str:
    """Bytes in KiB; an empty string for 0."""
    if count < 1024:
        return f"{count} B" if count else ""
    return f"{count / 1024:.4g} KiB"


def as_markdown(found: Sequence[Compiled]) -> str:
    """A row a case, a column an architecture."""
    main = {(case.op, case.name) for case in found if case.main}
    cells = [
        (
            (f"{case.op}: {case.name}{' (main)' if (case.op, case.name) in main else ''}",),
            label(case.capability),
            _cell(case),
        )
        for case in found
    ]
    return markdown(pivot(("kernel",), cells))


def _cell(case: Compiled) -> str:
    if not case.registers:
        return escape("; ".join(case.problems))
    threads = f" × {case.threads}" if case.threads else ""
    parts = [f"{case.registers} registers{threads}", kibibytes(case.shared_bytes)]
    if case.local_accesses:
        parts.append(f"{case.local_bytes} B local")
    if case.ahead is not None:
        parts.append(f"loads {case.ahead.products} products ahead")
    parts += [*case.matrix, *(f"[bold]{escape(problem)}[/]" for problem in case.problems)]
    return ", ".join(part for part in parts if part)

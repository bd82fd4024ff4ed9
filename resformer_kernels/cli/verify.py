"""`resformer-kernels verify`: compare every kernel with float64 on this machine."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table

from resformer_kernels.bench import machine
from resformer_kernels.bench.tables import pivot, summary_table, verdict_table
from resformer_kernels.cli import COMMANDS, Subparsers
from resformer_kernels.cli.common import counter, output, refuse
from resformer_kernels.testing.verification import Check, Verdict, checks, refusals, verify

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


BACKENDS = ("native", "triton", "flash_attn", "sdpa")
"""Backends that "all" runs where they serve; the reference runs where none does."""


@dataclass
class Plan:
    """Checks to run on one device with one backend."""

    backend: str
    device: str
    table: list[Check]
    left_out: dict[str, int] = field(default_factory=dict)
    """Number of checks that the backend refuses, by reason."""
    errors: list[str] = field(default_factory=list)
    """Errors that kernels raised."""


def add_parser(subparsers: Subparsers) -> None:
    """Declare the arguments of `verify`."""
    parser = subparsers.add_parser(
        "verify",
        help=COMMANDS["verify"],
        description="Run forward and backward of every op on a table of cases, with every backend "
        "that serves them here, and compare each output and gradient with float64. Exit code 1 "
        "where an error exceeds its budget or a kernel fails.",
    )
    parser.add_argument(
        "--backend",
        default="all",
        choices=("all", "auto", *BACKENDS, "reference"),
        help="backend to check; auto: the one that a call would get (default: all)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="check this device only (default: all available)"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=tuple(_DTYPES),
        help="check this dtype only; can be repeated (default: all)",
    )
    parser.add_argument("--tensors", action="store_true", help="print each tensor's worst case")
    parser.add_argument("--all", action="store_true", help="print every tensor of every case")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Verify and print. 0 where every tensor is within its budget; 1 where one is not; 2 where
    nothing can be checked."""
    begun = time.monotonic()
    dtypes = [_DTYPES[name] for name in (args.dtype or _DTYPES)]
    here = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if args.device is not None and args.device not in here:
        return refuse("verify", "torch finds no CUDA device, or is built without CUDA")
    plans = [p for d in ([args.device] if args.device else here) for p in plan(dtypes, args, d)]
    work = [(each, check) for each in plans for check in each.table]
    if not work:
        reasons = "; ".join(reason for p in plans for reason in p.left_out)
        return refuse("verify", f"{args.backend} serves no case here: {reasons}")
    found: list[Verdict] = []
    with counter() as progress:
        for each, check in progress.track(work, description="comparing with float64"):
            found += _judged(check, each)
    failed = [verdict for verdict in found if not verdict.ok]
    if args.json:
        print(json.dumps([{**asdict(v), "ok": v.ok} for v in found], indent=2))
    else:
        _print(found, failed, plans, args)
        output(100).print(
            f"{len(found)} tensors of {len(work)} cases in "
            f"{time.monotonic() - begun:.0f} s, CPU path {machine.native_path()}: "
            + (f"[bold red]{len(failed)} failed" if failed else "[bold green]all within budget")
        )
    return 1 if failed else 0


def plan(dtypes: Sequence[torch.dtype], args: argparse.Namespace, device: str) -> list[Plan]:
    """Checks to run on one device."""
    table = checks(dtypes, device=device)
    if args.backend == "auto":
        return [Plan("auto", device, table)]
    if args.backend != "all":
        return [Plan(args.backend, device, *refusals(table, args.backend))]
    plans = [Plan(backend, device, *refusals(table, backend)) for backend in BACKENDS]
    served = {id(check) for each in plans for check in each.table}
    rest = [check for check in table if id(check) not in served]
    return [*plans, Plan("reference", device, rest)]


def _judged(check: Check, about: Plan) -> list[Verdict]:
    """The check's verdicts; one failed verdict where a kernel raises."""
    try:
        (verdicts,) = verify([check], about.backend, about.device)
    except RuntimeError as error:
        about.errors.append(f"{check.op}, {check.case}, {check.dtype}: {error}")
        named = (check.op, check.case, check.dtype, "raised")
        return [Verdict(*named, float("inf"), 0.0, about.backend, about.device)]
    return verdicts


def _print(
    found: Sequence[Verdict], failed: Sequence[Verdict], plans: Sequence[Plan], args: Any
) -> None:
    console = output(100)
    console.print(backend_table(found))
    if args.tensors:
        console.print(summary_table(found))
    if args.all:
        console.print(verdict_table(found, "Every tensor"))
    elif failed:
        console.print(verdict_table(failed, "Failed"))
    for each in plans:
        for error in each.errors:
            console.print(f"[bold red]raised[/] by {each.backend} on {each.device}: ", end="")
            console.print(error, markup=False, highlight=False, soft_wrap=True)
        for reason, count in each.left_out.items():
            console.print(
                f"not run: {count} cases with {each.backend} on {each.device}: {reason}",
                highlight=False,
                soft_wrap=True,
            )


def backend_table(verdicts: Sequence[Verdict]) -> Table:
    """Largest error over its budget of each op, backend and dtype."""
    grouped: dict[tuple[tuple[str, str], str], list[Verdict]] = {}
    for v in sorted(verdicts, key=lambda v: (v.op, v.device)):
        row = (v.op.removeprefix("value_residual_"), f"{v.backend}, {v.device}")
        grouped.setdefault((row, v.dtype), []).append(v)
    cells = ((*place, _worst_cell(found)) for place, found in grouped.items())
    title = "Largest error of any output or gradient against float64, over its budget"
    return pivot(("op", "backend"), cells, numbers=True, title=title)


def _worst_cell(verdicts: Sequence[Verdict]) -> str:
    failed = sum(not verdict.ok for verdict in verdicts)
    if failed:
        return f"[bold red]{failed} of {len(verdicts)} failed[/]"
    return f"[green]{max(v.share for v in verdicts):4.0%}[/] of {len(verdicts)}"

"""`resformer-kernels verify`: hold every kernel against float64 on this machine."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.table import Table

from resformer_kernels.bench import machine
from resformer_kernels.cli import COMMANDS, Subparsers
from resformer_kernels.cli.common import counter, output, refuse
from resformer_kernels.testing.verification import Check, Verdict, checks, refusals, verify

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


BACKENDS = ("native", "triton", "flash_attn")
"""Those that "all" runs where they serve; the reference where none does."""


@dataclass
class Plan:
    """What is run on one device with one backend, and how many checks are not, by reason."""

    backend: str
    device: str
    table: list[Check]
    left_out: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    """What kernels raised."""


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
        help="whose results are checked; auto: the backend that calls get (default: all)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="this device alone (default: all that are here)"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=tuple(_DTYPES),
        help="check this dtype alone; may be repeated (default: all)",
    )
    parser.add_argument("--tensors", action="store_true", help="print the worst of each tensor too")
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
    if not any(p.table for p in plans):
        reasons = "; ".join(reason for p in plans for reason in p.left_out)
        return refuse("verify", f"{args.backend} serves no case here: {reasons}")
    found: list[Verdict] = []
    with counter() as progress:
        task = progress.add_task("comparing with float64", total=sum(len(p.table) for p in plans))
        for each in plans:
            for check in each.table:
                found += _judged(check, each)
                progress.advance(task)
    failed = [verdict for verdict in found if not verdict.ok]
    if args.json:
        print(json.dumps([{**asdict(v), "ok": v.ok} for v in found], indent=2))
    else:
        _print(found, failed, plans, args)
        output(100).print(
            f"{len(found)} tensors of {sum(len(p.table) for p in plans)} cases in "
            f"{time.monotonic() - begun:.0f} s, CPU path {machine.native_path()}: "
            + (f"[bold red]{len(failed)} failed" if failed else "[bold green]all within budget")
        )
    return 1 if failed else 0


def plan(dtypes: Sequence[torch.dtype], args: argparse.Namespace, device: str) -> list[Plan]:
    """What to run on one device."""
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
    """The check's verdicts; one that fails where its kernel does."""
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
    """The largest error of each op, backend and dtype over its budget."""
    dtypes = list(dict.fromkeys(verdict.dtype for verdict in verdicts))
    rows: dict[tuple[str, str], dict[str, list[Verdict]]] = {}
    for verdict in sorted(verdicts, key=lambda v: (v.op, v.device)):
        cells = rows.setdefault((verdict.op, f"{verdict.backend}, {verdict.device}"), {})
        cells.setdefault(verdict.dtype, []).append(verdict)
    table = Table(
        title="Largest error of any output or gradient against float64, over its budget",
        title_justify="left",
        header_style="bold",
    )
    table.add_column("op", overflow="fold")
    table.add_column("backend", no_wrap=True)
    for dtype in dtypes:
        table.add_column(dtype, justify="right", no_wrap=True)
    previous = ""
    for (op, backend), cells in rows.items():
        first = op.removeprefix("value_residual_") if op != previous else ""
        table.add_row(first, backend, *(_worst_cell(cells.get(dtype, [])) for dtype in dtypes))
        previous = op
    return table


def _worst_cell(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    failed = sum(not verdict.ok for verdict in verdicts)
    share = max(verdict.share for verdict in verdicts)
    if failed:
        return f"[bold red]{failed} of {len(verdicts)} failed[/]"
    return f"[green]{share:4.0%}[/] of {len(verdicts)}"


def worst(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Of each op, tensor and dtype the verdict that comes nearest to its budget."""
    found: dict[tuple[str, str, str], Verdict] = {}
    for verdict in verdicts:
        key = (verdict.op, verdict.tensor.split("[")[0], verdict.dtype)
        if key not in found or verdict.share > found[key].share:
            found[key] = verdict
    return list(found.values())


def summary_table(verdicts: Sequence[Verdict]) -> Table:
    """The worst error of each tensor over its budget, a column a dtype."""
    dtypes = list(dict.fromkeys(verdict.dtype for verdict in verdicts))
    rows: dict[tuple[str, str], dict[str, Verdict]] = {}
    for verdict in worst(verdicts):
        rows.setdefault((verdict.op, verdict.tensor.split("[")[0]), {})[verdict.dtype] = verdict
    table = Table(
        title="Error / budget, the worst case of each tensor (Frobenius norms, against float64)",
        title_justify="left",
        header_style="bold",
    )
    table.add_column("op", no_wrap=True)
    table.add_column("tensor", no_wrap=True)
    for dtype in dtypes:
        table.add_column(dtype, justify="right", no_wrap=True)
    previous = ""
    for (op, tensor), cells in sorted(rows.items(), key=lambda row: row[0][0]):
        if previous and op != previous:
            table.add_section()
        first = op.removeprefix("value_residual_") if op != previous else ""
        table.add_row(first, tensor, *(_cell(cells.get(dtype)) for dtype in dtypes))
        previous = op
    return table


def _cell(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    colour = "green" if verdict.ok else "bold red"
    return f"{verdict.error:.0e} / {verdict.budget:.0e} [{colour}]{verdict.share:4.0%}[/]"


def verdict_table(verdicts: Sequence[Verdict], title: str) -> Table:
    """Errors and budgets as a table; both are Frobenius norms."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for heading in ("op", "dtype", "backend", "tensor"):
        table.add_column(heading, no_wrap=True)
    for heading in ("error", "budget", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("case", overflow="fold")
    previous = ""
    for verdict in verdicts:
        group = f"{verdict.op} {verdict.dtype}"
        if previous and group != previous:
            table.add_section()
        table.add_row(
            verdict.op.replace("value_residual_attention", "attention")
            if group != previous
            else "",
            verdict.dtype if group != previous else "",
            f"{verdict.backend}, {verdict.device}",
            verdict.tensor,
            f"{verdict.error:.2e}",
            f"{verdict.budget:.2e}",
            f"[{'green' if verdict.ok else 'bold red'}]{verdict.share:.0%}",
            verdict.case,
        )
        previous = group
    return table

"""`resformer-kernels verify`: hold every kernel against float64 on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

import torch
from rich.table import Table

from resformer_kernels.cli import COMMANDS, Subparsers
from resformer_kernels.cli.common import counter, output
from resformer_kernels.testing import machine
from resformer_kernels.testing.verification import Verdict, checks, verify

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(subparsers: Subparsers) -> None:
    """Declare the arguments of `verify`."""
    parser = subparsers.add_parser(
        "verify",
        help=COMMANDS["verify"],
        description="Run forward and backward of every op on a table of cases and compare each "
        "output and gradient with float64. Exit code 1 where an error exceeds its budget.",
    )
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "native", "reference"),
        help="whose results are checked (default: auto, the backend that calls get)",
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=tuple(_DTYPES),
        help="check this dtype alone; may be repeated (default: all)",
    )
    parser.add_argument("--all", action="store_true", help="print every tensor of every case")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Verify and print. 0 where every tensor is within its budget, else 1."""
    console = output(120)
    dtypes = [_DTYPES[name] for name in (args.dtype or _DTYPES)]
    table = checks(dtypes)
    found: list[Verdict] = []
    with counter() as progress:
        task = progress.add_task("comparing with float64", total=len(table))
        for verdicts in verify(table, args.backend):
            found += verdicts
            progress.advance(task)
    failed = [verdict for verdict in found if not verdict.ok]
    if args.json:
        print(json.dumps([{**asdict(v), "ok": v.ok} for v in found], indent=2))
        return 1 if failed else 0
    console.print(verdict_table(found, "Every tensor") if args.all else summary_table(found))
    if failed and not args.all:
        console.print(verdict_table(failed, "Over budget"))
    served = sorted({str(check.serves()) for check in table})
    backend = args.backend if args.backend != "auto" else f"auto ({', '.join(served)})"
    console.print(
        f"{len(found)} tensors of {len(table)} cases, backend {backend}, CPU path "
        f"{machine.native_path()}: "
        + (f"[bold red]{len(failed)} over budget" if failed else "[bold green]all within budget")
    )
    return 1 if failed else 0


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
    for heading in ("op", "dtype", "tensor"):
        table.add_column(heading, no_wrap=True)
    for heading in ("error", "budget", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("case", no_wrap=True, overflow="ellipsis")
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
            verdict.tensor,
            f"{verdict.error:.2e}",
            f"{verdict.budget:.2e}",
            f"[{'green' if verdict.ok else 'bold red'}]{verdict.share:.0%}",
            verdict.case,
        )
        previous = group
    return table

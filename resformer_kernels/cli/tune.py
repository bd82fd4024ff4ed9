"""`resformer-kernels tune`: find the tile sizes of attention's Triton kernels on this GPU."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch

from resformer_kernels._triton import available
from resformer_kernels.cli import COMMANDS, INTERRUPTED, Subparsers, checkout
from resformer_kernels.cli.common import NO_CHECKOUT, Teller, refuse
from resformer_kernels.cli.device_check import add_run_arguments

_DEFAULT_MINUTES = 25.0


def add_parser(subparsers: Subparsers) -> None:
    """Declare the arguments of `tune`."""
    parser = subparsers.add_parser(
        "tune",
        help=COMMANDS["tune"],
        description="Try tile sizes, warps and stages of each Triton kernel of attention on this "
        "GPU, compare each with the reference, time those that are right, and write the table that "
        "the kernels read (nothing is tuned at run time). Entries that time does not reach stay "
        "as they are. Exit code 1 where a configuration of the table fails, 2 without a GPU. Runs "
        "from a checkout of the repository.",
    )
    out = "the table (default: the one in the package, which is updated)"
    add_run_arguments(parser, _DEFAULT_MINUTES, out)
    for name, words, choices in (
        ("head-dim", "head_dim", (64, 128, 256)),
        ("direction", "kernel", ("forward", "keys", "queries")),
        ("mask", "mask", ("causal", "full", "window")),
        ("precision", "precision", ("half", "float32")),
    ):
        parser.add_argument(
            f"--{name}",
            type=type(choices[0]),
            action="append",
            choices=choices,
            help=f"this {words} alone; may be repeated (default: "
            + ("half)" if name == "precision" else "all)"),
        )


def run(args: argparse.Namespace) -> int:
    """Search, print, write. 0; 1 where an entry of the table fails; 2 where none can be tuned."""
    if args.device is None and not torch.cuda.is_available():
        return refuse("tune", f"no CUDA device (torch {torch.__version__} sees none)")
    device = torch.device(args.device or "cuda")
    reason = available.unavailable_reason(device)
    if reason is not None:
        return refuse("tune", reason)
    modules = checkout("tuning", "tuning_space", "device.common", "device.run", "device.report")
    if modules is None:
        return refuse("tune", NO_CHECKOUT)
    tuning, space, common, device_run, report = modules
    settings = common.Settings(str(device), tiny=args.device is not None)
    points = space.points(
        args.head_dim or space.HEAD_DIMS,
        args.direction or space.DIRECTIONS,
        args.mask or space.MASKS,
        args.precision or space.PRECISIONS[:1],
    )
    search = tuning.Search(tuning.architecture(settings.device), tuning.load_table())
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0
    code = 0
    try:
        tuning.run(
            search,
            points,
            60 * args.minutes,
            partial(device_run.on_workers, settings),
            workers=args.workers or device_run.worker_count(memory),
            progress=Teller(),
        )
    except KeyboardInterrupt:
        print("interrupted; what was found is written", file=sys.stderr)
        code = INTERRUPTED
    path = args.out or tuning.configs().TABLE
    path.write_text(space.dumps(search.new_table()) + "\n")
    _show(search, points, space, report)
    print(f"written: {path}")
    return code or (1 if search.failures else 0)


def _show(search: Any, points: Any, space: Any, report: Any) -> None:
    report.show(report.tuned(search, points))
    for head_dim, seconds in search.placements.items():
        found = ", ".join(f"{rows}: {a / b:.2f}" for rows, (a, b) in sorted(seconds.items()))
        limit = space.inline_rows(seconds)
        print(f"D{head_dim}: mix inline up to {limit} rows (inline / prologue at {found})")
    for failure in search.failures:
        print(f"FAILED {failure}")
    if search.unfinished:
        print(f"{search.unfinished} trials not reached in the time")

"""`resformer-kernels device-check`: prove the kernels of a GPU, and time them, in a few minutes.

It runs from a checkout and needs torch and Triton alone; rich draws nicer tables.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from resformer_kernels.cli import COMMANDS, INTERRUPTED, Subparsers, checkout
from resformer_kernels.cli.common import NO_CHECKOUT, Teller, positive, refuse

_DEFAULT_MINUTES = 7.5


def add_parser(subparsers: Subparsers) -> None:
    """Declare the arguments of `device-check`."""
    parser = subparsers.add_parser(
        "device-check",
        help=COMMANDS["device-check"],
        description="On a machine with a GPU: compare every GPU backend with float64, then time "
        "attention and the mixes beside torch's SDPA (FlashAttention-2 and cuDNN), FlexAttention "
        "and FlashAttention 3 where it is installed, in percent of a matrix product's rate. "
        "Kernels that fail are reported and the run goes on; results are stored as they come. "
        "Exit code 1 where one failed, 2 without a GPU. Runs from a checkout of the repository.",
    )
    add_run_arguments(parser, _DEFAULT_MINUTES, "the JSON (default: reports/<gpu>.json)")
    parser.add_argument(
        "--no-build",
        action="store_true",
        help="do not build the CUDA library first; a library that exists is checked all the same",
    )


def add_run_arguments(parser: argparse.ArgumentParser, minutes: float, out: str) -> None:
    """Declare what `tune` has too: a time limit, and a file that `out` describes."""
    parser.add_argument(
        "--minutes",
        type=positive,
        default=minutes,
        help="time for everything (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)
    # For trying out the run without a GPU: small cases on another device.
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Check, time, store, print. 0; 1 where a kernel failed; 2 where nothing can be checked."""
    if args.device is None and not torch.cuda.is_available():
        return refuse("device-check", f"no CUDA device (torch {torch.__version__} sees none)")
    modules = checkout("device_jobs", "device_run", "device_report", "device_build")
    if modules is None:
        return refuse("device-check", NO_CHECKOUT)
    device_jobs, device_run, device_report, device_build = modules
    settings = device_jobs.Settings(args.device or "cuda", tiny=args.device is not None)

    def path(run: Any) -> Path:
        if args.out is not None:
            return Path(args.out)
        return Path("reports") / f"{run.ceilings.get('slug', 'device')}.json"

    build = None
    if args.device is None and not args.no_build:
        build = device_build.Build(torch.cuda.get_device_capability())
    try:
        found = device_run.run(settings, 60 * args.minutes, path, _Teller().of, args.workers, build)
    except KeyboardInterrupt:
        print("interrupted; what was found is stored", file=sys.stderr)
        return INTERRUPTED
    print(device_report.headline(found), end="\n\n")
    for sheet in device_report.sheets(found):
        device_report.show(sheet)
    print(_verdict(found))
    print(f"stored: {path(found)}")
    return 1 if found.failures else 0


def _verdict(found: Any) -> str:
    tensors = sum(len(check["verdicts"]) for check in found.checks)
    failed = f"{len(found.failures)} FAILED" if found.failures else "none failed"
    left = f"; {len(found.unfinished)} not reached in the time" if found.unfinished else ""
    return (
        f"CUDA library: {found.cuda_library}\n"
        f"{len(found.checks)} cases ({tensors} tensors) against float64, "
        f"{len(found.timings)} cases timed: {failed}{left}"
    )


class _Teller(Teller):
    """A `Teller` that also prints each failure at once."""

    _failures = 0

    def of(self, run: Any, phase: str, done: int, total: int) -> None:
        """Report progress of `device_run.run`."""
        for failure in run.failures[self._failures :]:
            self.say(f"FAILED {failure['job']} {failure['part']}: {failure['reason']}"[:300])
        self._failures = len(run.failures)
        self(phase, done, total)

"""`resformer-kernels device-check`: prove the kernels of a GPU, and time them, in 15 minutes.

It runs from a checkout and needs torch and Triton alone; rich draws nicer tables.
"""

from __future__ import annotations

import argparse
import shlex
import signal
from pathlib import Path
from typing import Any

import torch

from resformer_kernels.cli import COMMANDS, INTERRUPTED, Subparsers, checkout
from resformer_kernels.cli.common import NO_CHECKOUT, Teller, at_least, positive, refuse

_DEFAULT_MINUTES = 9.0
_MODULES = ("common", "plan", "record", "run", "report", "build", "bundle")


def add_parser(subparsers: Subparsers) -> None:
    """Declare the arguments of `device-check`."""
    parser = subparsers.add_parser(
        "device-check",
        help=COMMANDS["device-check"],
        description="On a machine with a GPU, in this order: a case of each family of kernels, "
        "attention first, reservoirs last; every case of every backend against float64, each "
        "kernel run again on the same inputs with its bits compared; large shapes against float64; "
        "eight cases beside torch's SDPA (FlashAttention-2 and cuDNN), FlashAttention 3 and 4 "
        "where they are installed and others, decoding under CUDA graphs; compute-sanitizer and "
        "ncu where the machine has them; and a few configurations of attention's kernels. Kernels "
        "that fail are reported and the run goes on; a family that crashed or hung twice is left "
        "out. Results are stored as they come, and the same command again goes on from them. Exit "
        "code 1 where one failed, 2 without a GPU. Runs from a checkout of the repository.",
    )
    out = (
        "the JSON (default: reports/<gpu>.json); beside it, under the same name, .txt has the "
        "tables, .log the progress and .configs.json what attention's table would become"
    )
    add_run_arguments(parser, _DEFAULT_MINUTES, out)
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="FILE",
        help="go on from this JSON of an earlier call (default: the one of --out, if its run is "
        "unfinished and of the same device, versions, sources and settings)",
    )
    parser.add_argument(
        "--repeats",
        type=at_least(1),
        default=20,
        metavar="N",
        help="runs of each kernel whose bits are compared (default: %(default)s)",
    )
    parser.add_argument(
        "--everything",
        action="store_true",
        help="at last time every registered case too, which takes about an hour",
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="what scripts/prepare_device_bundle.py prepared: compiled kernels, the CUDA library",
    )
    parser.add_argument(
        "--no-build",
        action="store_true",
        help="do not build the CUDA library first; a library that exists is checked all the same",
    )
    # A program in place of the worker, which crashes and hangs as a test wants it to.
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def add_run_arguments(parser: argparse.ArgumentParser, minutes: float, out: str) -> None:
    """Declare what `tune` has too: a time limit, and a file that `out` describes."""
    parser.add_argument(
        "--minutes",
        type=positive,
        default=minutes,
        help="time for this call (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)
    # For trying out the run without a GPU: small cases on another device.
    parser.add_argument("--device", help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=0, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Check, time, store, print. 0; 1 where a kernel failed; 2 where nothing can be checked."""
    if args.device is None and not torch.cuda.is_available():
        return refuse("device-check", f"no CUDA device (torch {torch.__version__} sees none)")
    modules = checkout(*(f"device.{name}" for name in _MODULES))
    if modules is None:
        return refuse("device-check", NO_CHECKOUT)
    # `timeout`, and whoever ends a rented machine's command, sends this one.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _checked(args, *modules)
    finally:
        signal.signal(signal.SIGTERM, before)


def _checked(
    args: argparse.Namespace,
    common: Any,
    plan: Any,
    record: Any,
    device_run: Any,
    report: Any,
    device_build: Any,
    bundle: Any,
) -> int:
    """The run itself, with the modules of the checkout."""
    tiny = args.device is not None
    samples = 2 if tiny else 7
    settings = common.Settings(args.device or "cuda", tiny, samples, args.repeats)
    fresh = record.fresh(settings)
    path: Path = args.out or Path("reports") / f"{record.slug(settings)}.json"
    teller = _Teller(path.with_suffix(".log"))
    try:
        found = _begin(args.resume, path, fresh, record, teller)
        unpacked = bundle.unpack(args.bundle, found) if args.bundle else bundle.NOTHING
    except (record.Mismatch, bundle.Unusable) as error:
        return refuse("device-check", str(error))
    build = None
    if not (tiny or args.no_build or unpacked.library):
        build = device_build.Build(torch.cuda.get_device_capability())
    phases = plan.phases(settings, found.shortlist, everything=args.everything)
    call = device_run.Call(
        settings,
        phases,
        path,
        teller.of,
        workers=args.workers,
        build=build,
        worker=shlex.split(args.worker) if args.worker else device_run.WORKER,
        environment=unpacked.environment,
        begun=teller.begun,
    )
    teller.expect(found)
    device_run.plan(found, phases)
    code = 0
    try:
        about = f"{found.machine['device']}: {len(found.planned)} jobs"
        teller.say(f"{about}, {args.minutes:g} minutes, stored in {path}")
        device_run.run(found, call, args.minutes)
    except KeyboardInterrupt:
        found.store(path)
        teller.say("interrupted; what was found is stored")
        code = INTERRUPTED
    _print(found, report, path)
    return code or (1 if found.failures else 0)


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _begin(resume: Path | None, path: Path, fresh: Any, record: Any, teller: _Teller) -> Any:
    """The run to go on with: that of `resume`, or of `path`, or a fresh one."""
    if resume is not None:
        found = record.stored(resume, fresh.fingerprint)
        teller.say(f"going on from {resume}: {len(found.done)} jobs are done")
        return found
    if not path.exists():
        return fresh
    try:
        found = record.stored(path, fresh.fingerprint)
    except record.Mismatch as error:
        teller.say(f"beginning anew: {error}")
        return fresh
    if not found.unfinished:
        teller.say(f"beginning anew: the run in {path} is complete")
        return fresh
    teller.say(f"going on from {path}: {len(found.done)} jobs are done; remove it to begin anew")
    return found


def _print(found: Any, report: Any, path: Path) -> None:
    """The tables, on the terminal and in a file; what won in the table of configurations."""
    print(report.headline(found), end="\n\n")
    sheets = report.sheets(found)
    for sheet in sheets:
        report.show(sheet)
    verdict = report.verdict(found)
    print(verdict)
    text = [report.headline(found), *(sheet.plain() for sheet in sheets), verdict]
    path.with_suffix(".txt").write_text("\n\n".join(text) + "\n")
    print(f"stored: {path}")
    configs = report.configs(found)
    if configs:
        at = path.with_suffix(".configs.json")
        at.write_text(configs)
        print(f"stored: {at}, faster on this GPU: compare, then copy to the package's table")
    if found.unfinished:
        print(f"{len(found.unfinished)} jobs are left: the same command again goes on from here")


class _Teller(Teller):
    """A `Teller` that keeps its lines in a file too, and tells each finding at once."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self._log = log
        self._failures = 0
        self._before = 0
        self._out: set[str] = set()

    def say(self, text: str) -> None:
        """Print a line with the seconds since the beginning."""
        super().say(text)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("a") as log:
            print(self.line(text), file=log)

    def expect(self, run: Any) -> None:
        """Take note of what an earlier call has told."""
        self._failures = len(run.failures)
        self._out = {family for family in run.crashes if run.is_out(family)}

    def of(self, run: Any, phase: str, done: int, total: int) -> None:
        """Report progress of `device.run`."""
        for failure in run.failures[self._failures :]:
            part = f" {failure['part']}" if failure["part"] else ""
            self.say(f"FAILED {failure['job']}{part}: {failure['reason']}"[:300])
        self._failures = len(run.failures)
        for family in {family for family in run.crashes if run.is_out(family)} - self._out:
            self._out.add(family)
            self.say(f"LEFT OUT from now on: {family}, which crashed or hung too often")
        if done == 0:
            self._before = self._failures
        failed = self._failures - self._before
        self(phase, done, total, f", {failed} FAILED" if failed else "")

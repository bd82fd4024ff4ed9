"""`resformer-kernels bench`: time every registered case against its peers."""

from __future__ import annotations

import argparse
import importlib.util
from datetime import datetime
from pathlib import Path

from resformer_kernels.bench.timing import MIN_SAMPLES
from resformer_kernels.cli import COMMANDS, Subparsers, checkout
from resformer_kernels.cli.common import NO_CHECKOUT, at_least, refuse

_SUITES = ("attention", "exclusive", "window", "mix", "decode", "scan", "reservoir")
_DESCRIPTION = """\
Time every case of benchmarks/ against every peer that is installed, alternating in one process,
with the machine's GEMM rate and bandwidth measured in the same run, and store and draw the result.
Runs from a checkout of the repository. The exit code is 1 where --compare finds a case slower, or a
tensor is over its error budget."""


def add_parser(subparsers: Subparsers) -> None:
    """Declare the arguments of `bench`."""
    parser = subparsers.add_parser("bench", help=COMMANDS["bench"], description=_DESCRIPTION)
    add = parser.add_argument_group("what is timed").add_argument
    add("--suite", choices=_SUITES, help="only the cases of one kind")
    text = "only peers whose name contains one of these, and cases that have such a peer"
    add("--peer", metavar="NAME", nargs="+", help=text)
    text = "only cases whose name has every word of TEXT; repeated: any of them"
    add("--filter", metavar="TEXT", action="append", help=text)
    add("--quick", action="store_true", help="short cases, no compiling")
    add("--list", action="store_true", help="print the names of cases and peers and stop")
    text = "timed samples of ours and of each peer (default: %(default)s)"
    add("--samples", type=at_least(MIN_SAMPLES), default=MIN_SAMPLES, help=text)
    text = "threads that torch and the kernels use (default: torch's own choice)"
    add("--threads", type=at_least(1), help=text)
    text = "show, compare or draw these stored runs, and time nothing"
    add("--from", dest="stored", type=Path, nargs="+", metavar="FILE", help=text)
    add = parser.add_argument_group("output").add_argument
    text = "store the run here (default, if every case is timed: reports/bench-DATE-TIME/run.json)"
    add("--json", type=Path, metavar="FILE", help=text)
    text = "name the cases that are slower than in this stored run by more than the spread of both"
    add("--compare", type=Path, metavar="FILE", help=text)
    text = (
        "write DIR/index.html, one page that needs nothing else, and its figures in DIR/figures "
        "(default, if every case is timed: reports/bench-DATE-TIME)"
    )
    add("--html", type=Path, metavar="DIR", help=text)


def run(args: argparse.Namespace) -> int:
    """Time, print, store. 1 where a case is slower or a tensor over budget, 2 for a usage error."""
    # A run of every case is stored and drawn by default.
    if not any((args.list, args.quick, args.filter, args.suite, args.peer, args.stored)):
        folder = Path("reports") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
        args.json = args.json or folder / "run.json"
        args.html = args.html or folder
    for package in ("pytest_benchmark", *(("matplotlib",) if args.html else ())):
        if importlib.util.find_spec(package) is None:
            return refuse("bench", f"{package} is missing: pip install 'resformer-kernels[bench]'")
    found = checkout("bench")
    if found is None:
        return refuse("bench", NO_CHECKOUT)
    return int(found[0].run(args))

"""`resformer-kernels demo`: verify, time, train small models on real text, write a report."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from datetime import datetime
from pathlib import Path

from resformer_kernels.cli import COMMANDS, INTERRUPTED, Subparsers
from resformer_kernels.cli.common import at_least, output, positive, refuse

_DEFAULT_MINUTES = 4.25  # leaves 45 s of five minutes for imports and for a busy machine


def add_parser(subparsers: Subparsers) -> None:
    """Declare the arguments of `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help=COMMANDS["demo"],
        description="Compare the kernels with float64, time them beside torch's SDPA, train a "
        "Transformer, a ResFormer and an SVFormer of equal size on real text, and write a report. "
        "Ctrl-C ends it early with a report of what was measured by then.",
    )
    parser.add_argument(
        "--minutes",
        type=positive,
        default=_DEFAULT_MINUTES,
        help="approximate time for all parts and the report together (default: %(default)s)",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="PATH",
        help="a file or folder to train on (default: the English text and Python source that "
        "ship with the running interpreter)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the report (default: reports/demo-DATE-TIME)",
    )
    sizes = parser.add_argument_group("model size")
    for name, default, what in (
        ("dim", 128, "channels "),
        ("layers", 4, ""),
        ("heads", 2, ""),
        ("seqlen", 256, "bytes a window "),
        ("batch", 4, "windows a step "),
    ):
        text = f"{what}(default: %(default)s)"
        sizes.add_argument(f"--{name}", type=at_least(1), default=default, help=text)


def run(args: argparse.Namespace) -> int:
    """Run the demo. 0; 1 where a kernel is over budget, 2 for bad arguments, 130 on Ctrl-C."""
    console = output(120)
    if importlib.util.find_spec("matplotlib") is None:
        return refuse("demo", "matplotlib is missing: pip install 'resformer-kernels[bench]'")
    from resformer_kernels.bench import machine
    from resformer_kernels.demo.corpus import load_corpus
    from resformer_kernels.demo.pipeline import Demo
    from resformer_kernels.demo.record import Record
    from resformer_kernels.demo.report import summary
    from resformer_kernels.demo.training import Plan, configs

    plan = Plan(args.dim, args.layers, args.heads, args.seqlen, args.batch)
    started = datetime.now()
    folder = args.out or Path("reports") / f"demo-{started:%Y%m%d-%H%M%S}"
    command = shlex.join(["resformer-kernels", *sys.argv[1:]])
    try:
        configs(plan)
        corpus = load_corpus(args.corpus)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return refuse("demo", str(error))
    record = Record(machine.describe(), args.minutes, plan, started, command, corpus)
    path = Demo(record, folder, console).run()
    for line in summary(record):
        console.print(line.replace("**", ""))
    console.print(f"\nReport: [bold]{path}[/]", soft_wrap=True)
    if record.interrupted_in is not None:
        console.print(f"Interrupted during {record.interrupted_in}: the report is partial.")
        return INTERRUPTED
    return 1 if record.failed else 0

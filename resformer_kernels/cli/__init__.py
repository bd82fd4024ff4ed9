"""The command line, `resformer-kernels`.

Each subcommand is a module of this package with `add_parser(subparsers)`, which declares its
arguments, and `run(args) -> int`, which returns the exit code. Only the module of the requested
command is imported: `info` must work where the packages that `demo` needs are missing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypeAlias, cast

from resformer_kernels import __version__

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

COMMANDS: dict[str, str] = {
    "info": "show what this installation can run, and why",
    "verify": "compare every kernel with float64",
    "bench": "time every registered case against its peers",
    "compile-check": "compile every Triton kernel for GPUs that need not be present",
    "device-check": "compare a GPU's kernels with float64, and time them",
    "tune": "find the tile sizes of the Triton kernels on this GPU",
    "demo": "verify, time, train small models on real text, write a report",
}
"""Subcommands, with their line in `--help`. Modules have underscores instead of hyphens."""

_CHECKOUT = Path(__file__).resolve().parents[2]

INTERRUPTED = 130
"""Exit code of a command that Ctrl-C ended, as shells expect it."""


class Command(Protocol):
    """Interface of a subcommand's module."""

    def add_parser(self, subparsers: Subparsers) -> None:
        """Declare the command's arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the command; 0 is success, 1 a failed check, 2 a usage error."""


def checkout(*names: str) -> tuple[ModuleType, ...] | None:
    """Modules of benchmarks/ of a checkout, by name; None without a checkout.

    The checkout that the package runs from takes precedence over the current folder.
    """
    for root in (_CHECKOUT, Path.cwd()):
        if (root / "benchmarks" / "registry.py").exists():
            if str(root) not in sys.path:
                sys.path.insert(0, str(root))
            return tuple(importlib.import_module(f"benchmarks.{name}") for name in names)
    return None


def _load(name: str) -> Command:
    return cast(Command, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="resformer-kernels",
        description="Kernels for value-residual attention: inspect, check and time them.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name == chosen:
            _load(name).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    args = _parser(chosen).parse_args(arguments)
    try:
        return _load(args.command).run(args)
    except KeyboardInterrupt:
        return INTERRUPTED

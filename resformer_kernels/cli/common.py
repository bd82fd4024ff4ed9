"""What the commands share: arguments, refusals, and where they print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer that is not below `minimum`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return integer


def refuse(command: str, reason: str) -> int:
    """Say why `command` does not run, as argparse would; the exit code of a usage error."""
    print(f"resformer-kernels {command}: error: {reason}", file=sys.stderr)
    return 2


def output(width: int) -> Console:
    """Standard output. A table meant for a file gets `width`; a terminal's own is left to rich."""
    return Console(width=None if Console().is_terminal else width)


def counter() -> Progress:
    """A bar on standard error that counts cases, and leaves nothing behind."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )

"""What the commands share: arguments, refusals, and where they print.

Rich is imported where it prints: `device-check` and `tune` do without it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

NO_CHECKOUT = (
    "no benchmarks/ beside the package or in the current folder: it is in the repository, run this "
    "from a checkout"
)


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer that is not below `minimum`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, got {value}")
        return value

    return integer


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return value


def refuse(command: str, reason: str) -> int:
    """Say why `command` does not run, as argparse would; the exit code of a usage error."""
    print(f"resformer-kernels {command}: error: {reason}", file=sys.stderr)
    return 2


def output(width: int) -> Console:
    """Standard output. A table meant for a file gets `width`; a terminal's own is left to rich."""
    from rich.console import Console

    return Console(width=None if Console().is_terminal else width)


def counter() -> Progress:
    """A bar on standard error that counts cases, and leaves nothing behind."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


class Teller:
    """Where a long run is, in lines on standard error: `teller(phase, done, total)`."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self._every = every_seconds
        self._begun = self._told = time.monotonic()
        self._phase = ""

    def __call__(self, phase: str, done: int, total: int) -> None:
        """Tell of a new phase, its end, and what is between when some time has passed."""
        now = time.monotonic()
        if phase != self._phase or done == total or now - self._told > self._every:
            self.say(f"{phase}: {done} of {total}")
            self._phase, self._told = phase, now

    def say(self, text: str) -> None:
        """A line, with the seconds since the beginning."""
        print(f"[{time.monotonic() - self._begun:4.0f} s] {text}", file=sys.stderr, flush=True)

"""Helpers that the commands share: argument types, refusals, consoles and progress.

Rich is imported inside functions: `device-check` and `tune` run without it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from typing_extensions import Self

NO_CHECKOUT = (
    "no benchmarks/ beside the package or in the current folder: it is part of the repository, run "
    "this from a checkout"
)

_QUIET_SECONDS = 20.0
"""Seconds between lines about a step that goes on."""


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: an integer of at least `minimum`."""

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
    """A console on standard output, `width` wide where that is no terminal."""
    from rich.console import Console

    return Console(width=None if Console().is_terminal else width)


def counter() -> Progress:
    """A progress bar on standard error that counts cases and is removed at the end."""
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


class Meter:
    """Progress of a run of unequal steps: a bar with the time left, or lines without a terminal.

    Args:
        costs: expected duration of each step, in any unit.
    """

    def __init__(self, costs: Sequence[float]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._costs, self._done = costs, 0
        self._teller = None if console.is_terminal else Teller(_QUIET_SECONDS)
        self._progress = Progress(
            TextColumn("{task.fields[place]}"),
            BarColumn(bar_width=24),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("left  {task.description}"),
            console=console,
            transient=True,
            speed_estimate_period=300.0,
        )
        self._task = self._progress.add_task("", total=sum(costs), place="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, name: str) -> None:
        """Begin a step, which ends the one before. Steps beyond the expected ones cost 0."""
        count = len(self._costs)
        if 0 < self._done <= count:
            self._progress.advance(self._task, self._costs[self._done - 1])
        self._done += 1
        place = f"{min(self._done, count)} of {count}"
        self._progress.update(self._task, description=name, place=place)
        if self._teller is not None:
            self._teller(name.split()[0], self._done, count)


class Teller:
    """Progress of a long run in lines on standard error: `teller(phase, done, total)`."""

    def __init__(self, every_seconds: float = 5.0) -> None:
        self._every = every_seconds
        self.begun = self._told = time.monotonic()
        self._phase = ""

    def __call__(self, phase: str, done: int, total: int, more: str = "") -> None:
        """Report a new phase, its end, and progress between them from time to time; `more` ends
        the line."""
        now = time.monotonic()
        if phase != self._phase or done == total or now - self._told > self._every:
            self.say(f"{phase}: {done} of {total}{more}")
            self._phase, self._told = phase, now

    def say(self, text: str) -> None:
        """Print a line with the seconds since the beginning."""
        print(self.line(text), file=sys.stderr, flush=True)

    def line(self, text: str) -> str:
        """A line with the seconds since the beginning."""
        return f"[{time.monotonic() - self.begun:4.0f} s] {text}"

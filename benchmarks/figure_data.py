"""What the figures of a report are drawn from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks import curves
from benchmarks.runner import MemoryPoint, Run
from benchmarks.workloads.decode import OWN_VALUES
from benchmarks.workloads.scan import COPY
from resformer_kernels.bench.timing import Benchmark, Result

_LABELS = re.compile(r"\b(B|Hq|Hkv|H|T|N|D)(\d+)\b")


@dataclass(frozen=True)
class Drawing:
    """A figure with its words."""

    name: str
    """Also of its file."""
    section: str
    title: str
    caption: str
    svg: str


class Cases:
    """The newest result of every case, with its run."""

    def __init__(self, runs: Sequence[Run]) -> None:
        newest = sorted(runs, key=lambda run: run.started)
        self.found = {result.name: (result, run) for run in newest for result in run.results}
        self.memory: dict[tuple[str, int], MemoryPoint] = {
            (point.contestant, point.length): point for run in newest for point in run.memory
        }
        self.errors = [verdict for run in newest[-1:] for verdict in run.errors]
        ops = {verdict.op for verdict in self.errors}
        for run in reversed(newest[:-1]):
            self.errors += [verdict for verdict in run.errors if verdict.op not in ops]
            ops |= {verdict.op for verdict in run.errors}

    def of(self, cases: Iterable[Benchmark]) -> list[tuple[Result, Run]]:
        """Those of these cases that were measured."""
        return [self.found[case.name] for case in cases if case.name in self.found]

    def group(self, group: str, *, yardstick: bool | None = False) -> list[Result]:
        """What stands under this heading, curves left out, and has a peer.

        Args:
            group: the heading.
            yardstick: those whose fastest peer is a yardstick: a copy, or our own kernel otherwise
                used. False: those that are held against somebody else's work. None: all.
        """
        drawn = {case.name for case in every_curve()}
        return [
            result
            for name, (result, _) in self.found.items()
            if result.group == group
            and name not in drawn
            and result.peers
            and yardstick in (None, result.peer in (COPY, OWN_VALUES))
        ]


def every_curve() -> list[Benchmark]:
    """The cases that are points of a curve."""
    return [*curves.attention(), *curves.decode_grid(), *curves.scan(), *curves.reservoir()]


def sizes(name: str) -> dict[str, int]:
    """The sizes that a case's name tells: B, H or Hq and Hkv, T, N, D."""
    return {key: int(value) for key, value in _LABELS.findall(name)}

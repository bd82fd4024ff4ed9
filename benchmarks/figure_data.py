"""The data that the figures of a report are drawn from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from benchmarks import curves
from benchmarks.figure_style import Look, look
from benchmarks.runner import Run
from benchmarks.workloads.decode import OWN_VALUES
from benchmarks.workloads.scan import COPY
from resformer_kernels.bench.timing import Benchmark, Result
from resformer_kernels.testing.verification import Verdict

_LABELS = re.compile(r"\b(B|Hq|Hkv|H|T|N|D)(\d+)\b")

Curve: TypeAlias = dict[Look, dict[float, float]]
"""The lines of a plot: y by x."""


class Cases:
    """The newest result of every case, with its run."""

    def __init__(self, runs: Sequence[Run]) -> None:
        newest = sorted(runs, key=lambda run: run.started)
        self.found = {result.name: (result, run) for run in newest for result in run.results}
        points = (point for run in newest for point in run.memory)
        self.memory = {(point.contestant, point.length): point.bytes for point in points}
        self.errors: list[Verdict] = []
        for run in reversed(newest):
            known = {verdict.op for verdict in self.errors}
            self.errors += [verdict for verdict in run.errors if verdict.op not in known]

    def of(self, cases: Iterable[Benchmark], *names: str) -> list[tuple[Result, Run]]:
        """The measured ones of these cases, and of the cases of these names."""
        wanted = (*(case.name for case in cases), *names)
        return [self.found[name] for name in wanted if name in self.found]

    def group(self, group: str, *, yardstick: bool | None = False) -> list[Result]:
        """The results under this heading that have a peer, without the points of curves.

        Args:
            group: the heading.
            yardstick: True: only those whose fastest peer is a yardstick, which is a copy or our
                own kernel used otherwise. False: only those compared with somebody else's work.
                None: all.
        """
        drawn = {case.name for case in curves.every()}
        return [
            result
            for name, (result, _) in self.found.items()
            if result.group == group
            and name not in drawn
            and result.peers
            and yardstick in (None, result.peer in (COPY, OWN_VALUES))
        ]


def sizes(name: str) -> dict[str, int]:
    """The sizes in a case's name: B, H or Hq and Hkv, T, N, D."""
    return {key: int(value) for key, value in _LABELS.findall(name)}


def best(
    found: Iterable[tuple[Result, Run]],
    x: str,
    y: Callable[[Result, str], float | None],
    pick: Callable[[float, float], float] = min,
) -> Curve:
    """`y` over one size of the cases; of the contestants that look the same, what `pick` takes.

    `y(result, contestant)` is None, or 0, where nothing was measured.
    """
    curve: Curve = {}
    for result, _ in found:
        place = sizes(result.name)[x]
        for contestant in result.timings:
            if value := y(result, contestant):
                line = curve.setdefault(look(contestant), {})
                line[place] = pick(value, line.get(place, value))
    return curve

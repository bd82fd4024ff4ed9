"""What became slower since a stored run.

Two runs differ by more than their code: another day, busier neighbours, another layout of memory.
So a case is slower only where all of this holds:

- the medians lie further apart than the quartiles of both runs together: for two sets of seven
  samples that differ by chance alone, that happens about once in 1500;
- the median grew by more than `LEAST`, the difference between one process and the next;
- it grew beside its peers: what slowed them, measured in turn with ours, slowed ours no more.

`resformer-kernels bench` times what looks slower once more before it says so.

A peer that is this package's own code is no yardstick for it. A case that has no other peer is
compared with the peers of the whole run.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.runner import Run
from resformer_kernels.bench.timing import OURS, Result, Timing

LEAST = 0.05


@dataclass(frozen=True)
class Change:
    """One case in both runs."""

    name: str
    before: float
    after: float
    """Medians, seconds."""
    drift: float
    """How many times longer its yardstick took than in the stored run; 1 where it has none."""
    beyond_spread: bool
    """The medians lie further apart than the quartiles of both runs together, drift allowed for."""

    @property
    def times_longer(self) -> float:
        """The ratio of the medians."""
        return self.after / self.before

    @property
    def slower(self) -> bool:
        """Slower by more than the spread of both, and more than its yardstick."""
        return self.beyond_spread and self.times_longer > (1 + LEAST) * max(1.0, self.drift)


def compare(run: Run, stored: Run) -> list[Change]:
    """Each case that both runs have, in the order of `run`."""
    then = {result.name: result for result in stored.results}
    pairs = [(result, then[result.name]) for result in run.results if result.name in then]
    drifts = [_drift(*pair) for pair in pairs]
    overall = statistics.median([drift for drift in drifts if drift is not None] or [1.0])
    return [
        _change(*pair, overall if drift is None else drift)
        for pair, drift in zip(pairs, drifts, strict=True)
    ]


def slower(changes: Sequence[Change]) -> list[Change]:
    """Those that are slower."""
    return [change for change in changes if change.slower]


def _change(now: Result, then: Result, drift: float) -> Change:
    allowed = max(1.0, drift)
    apart = now.ours.median - allowed * then.ours.median
    beyond = apart > _quartiles_apart(now.ours) + allowed * _quartiles_apart(then.ours)
    return Change(now.name, then.ours.median, now.ours.median, drift, beyond)


def _quartiles_apart(timing: Timing) -> float:
    return 2 * timing.spread * timing.median


def _drift(now: Result, then: Result) -> float | None:
    """How many times longer the peers of both runs took, as a median; None where none is shared."""
    shared = [name for name in now.peers if name in then.timings and not name.startswith(OURS)]
    ratios = [now.timings[name].median / then.timings[name].median for name in shared]
    return statistics.median(ratios) if ratios else None

"""What became slower since a stored run.

Runs differ by more than their code: another day, busier neighbours, memory laid out otherwise. So
a case is slower only where all of this holds:

- the medians lie further apart than the quartiles of both runs do, taken together: for two sets of
  seven samples that differ by chance alone, that happens about once in 1500;
- the median grew by more than `LEAST`, by which one process differs from the next;
- it did so beside its peers: what slowed them, measured in turn with ours, slowed ours no more.

`resformer-kernels bench` times what looks slower once more before it says so.

A peer that is this package's own code is no yardstick for it. A case that has no other is held
against the peers of the whole run.
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
    """How many times longer its yardstick took than then; 1 where it has none."""
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
    drifts = [drift for pair in pairs if (drift := _drift(*pair)) is not None]
    overall = statistics.median(drifts) if drifts else 1.0
    return [_change(now, before, overall) for now, before in pairs]


def slower(changes: Sequence[Change]) -> list[Change]:
    """Those that are slower."""
    return [change for change in changes if change.slower]


def _change(now: Result, then: Result, overall: float) -> Change:
    own = _drift(now, then)
    drift = overall if own is None else own
    allowed = max(1.0, drift)
    apart = now.ours.median - allowed * then.ours.median
    beyond = apart > _quartiles_apart(now.ours) + allowed * _quartiles_apart(then.ours)
    return Change(now.name, then.ours.median, now.ours.median, drift, beyond)


def _quartiles_apart(timing: Timing) -> float:
    return 2 * timing.spread * timing.median


def _drift(now: Result, then: Result) -> float | None:
    """How many times longer the peers of both took: the median over them; None without any."""
    shared = [name for name in now.peers if name in then.timings and not name.startswith(OURS)]
    if not shared:
        return None
    return statistics.median(now.timings[n].median / then.timings[n].median for n in shared)

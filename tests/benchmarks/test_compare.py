"""Which cases `bench --compare` calls slower."""

from __future__ import annotations

import itertools
import random

import pytest

from benchmarks.compare import compare, slower
from benchmarks.runner import Run
from resformer_kernels.bench.timing import Result, Timing


def a_run(times: dict[str, float], *, noise: float = 0.01, seed: int = 0, name: str = "a") -> Run:
    """One case whose contestants take these times, give or take `noise`."""
    rng = random.Random(seed)
    timings = {
        contestant: Timing(tuple(seconds * rng.gauss(1, noise) for _ in range(7)))
        for contestant, seconds in times.items()
    }
    return Run({}, "now", results=[Result(name, "group", "float32", 1, 1, timings)])


STORED = a_run({"ours": 1.0, "SDPA": 2.0})


@pytest.mark.parametrize("noise", [0.001, 0.02, 0.2])
def test_noise_is_no_regression(noise: float) -> None:
    stored = a_run({"ours": 1.0, "SDPA": 2.0}, noise=noise, seed=1)
    flagged = [
        bool(slower(compare(a_run({"ours": 1.0, "SDPA": 2.0}, noise=noise, seed=seed), stored)))
        for seed in range(2, 402)
    ]
    assert sum(flagged) <= 2, "and the command asks twice"
    assert (True, True) not in set(itertools.pairwise(flagged))


def test_what_is_slower_than_the_spread_of_both_is_found() -> None:
    (change,) = compare(a_run({"ours": 1.2, "SDPA": 2.0}, seed=3), STORED)
    assert change.slower
    assert change.times_longer == pytest.approx(1.2, rel=0.03)
    assert change.drift == pytest.approx(1.0, rel=0.03)


def test_one_disturbed_sample_of_either_run_hides_nothing() -> None:
    disturbed = a_run({"ours": 1.0, "SDPA": 2.0}, seed=1)
    timings = disturbed.results[0].timings
    timings["ours"] = Timing((9.0, *timings["ours"].samples[1:]))
    now = a_run({"ours": 1.2, "SDPA": 2.0}, seed=2)
    assert slower(compare(now, disturbed))
    now.results[0].timings["ours"] = Timing((0.5, *now.results[0].timings["ours"].samples[1:]))
    assert slower(compare(now, STORED))


def test_within_the_spread_nothing_is_slower() -> None:
    wide = a_run({"ours": 1.0, "SDPA": 2.0}, noise=0.15, seed=4)
    assert not slower(compare(a_run({"ours": 1.2, "SDPA": 2.0}, seed=5), wide))


def test_a_busier_machine_slows_the_peers_too() -> None:
    assert not slower(compare(a_run({"ours": 1.5, "SDPA": 3.0}, seed=6), STORED))
    (change,) = compare(a_run({"ours": 2.1, "SDPA": 3.0}, seed=6), STORED)
    assert change.slower


def test_our_own_code_is_no_yardstick() -> None:
    stored = a_run({"ours": 1.0, "ours, V a layer": 2.0})
    (change,) = compare(a_run({"ours": 1.5, "ours, V a layer": 3.0}, seed=7), stored)
    assert change.slower
    assert change.drift == 1.0


def test_a_case_without_a_yardstick_has_that_of_the_run() -> None:
    stored = a_run({"ours": 1.0, "ours, V a layer": 2.0}, name="b")
    stored.results += STORED.results
    now = a_run({"ours": 1.5, "ours, V a layer": 3.0}, seed=8, name="b")
    now.results += a_run({"ours": 1.5, "SDPA": 3.0}, seed=9).results
    assert not slower(compare(now, stored))


def test_only_cases_of_both_runs_are_compared() -> None:
    assert compare(a_run({"ours": 9.0}, name="new"), STORED) == []

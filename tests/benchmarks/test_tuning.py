"""The search for configurations, on a fake GPU that is fastest with one of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import tuning
from benchmarks import tuning_space as space
from benchmarks.device.common import Settings
from benchmarks.supervisor import Job, Outcome
from benchmarks.tuning_space import Config, Point, Table, Trial

OWN: Config = (128, 64, 8, 2)
FAVOURITE: Config = (64, 128, 8, 3)
POINT = Point("forward", "half", 128, "causal")


def table() -> Table:
    by_dim = {str(dim): {"full": list(OWN)} for dim in (64, 128, 256)}
    by_precision = {precision: json.loads(json.dumps(by_dim)) for precision in ("half", "float32")}
    directions = {name: json.loads(json.dumps(by_precision)) for name in space.DIRECTIONS}
    return {"sm90": {"inline_rows": {"64": 512, "128": 256, "256": 128}, **directions}}


class Gpu:
    """Times a configuration by how far it is from the favourite, and each job by its own clock."""

    def __init__(self, *, job_seconds: float = 0.1, wrong: Sequence[Config] = ()) -> None:
        self.now = 0.0
        self.job_seconds = job_seconds
        self.wrong = wrong
        self.phases: list[tuple[str, int]] = []

    def clock(self) -> float:
        return self.now

    def supervise(
        self,
        jobs: Sequence[Job],
        workers: int,
        until: float,
        on_outcome: Callable[[Outcome], Job | None],
    ) -> None:
        self.phases.append((jobs[0].kind, workers))
        for job in jobs:
            if self.now >= until:
                on_outcome(Outcome(job, error="the time was up", unfinished=True))
                continue
            self.now += self.job_seconds / workers
            on_outcome(self.outcome(job))

    def outcome(self, job: Job) -> Outcome:
        if job.kind == tuning.PLACE:
            _, rows = job.payload
            return Outcome(job, {"inline": float(rows), "prologue": 300.0})
        config = job.payload.config
        if config in self.wrong:
            return Outcome(job, error="out of resource: shared memory")
        if config == (16, 128, 4, 1):
            return Outcome(job, {"wrong": "result 0 is off by 0.700", "seconds": 1e-9})
        far = sum(abs(math.log2(a / b)) for a, b in zip(config, FAVOURITE, strict=True))
        return Outcome(job, {"wrong": "", "seconds": 1e-3 * (1 + far)})


def searched(gpu: Gpu, wanted: Sequence[Point] = (POINT,), budget: float = 1000.0) -> tuning.Search:
    search = tuning.Search("sm90", table())
    told: list[tuple[str, int, int]] = []
    tuning.run(
        search,
        wanted,
        budget,
        gpu.supervise,
        workers=4,
        progress=lambda *where: told.append(where),
        clock=gpu.clock,
    )
    assert told[-1][1] == told[-1][2]
    return search


def test_candidates_begin_with_the_tables_own_and_those_like_it() -> None:
    found = space.candidates(table(), "sm90", POINT)
    assert found[0].config == OWN
    assert len({trial.config for trial in found}) == len(found) > 20
    assert FAVOURITE in {trial.config for trial in found}
    changes = sum(a != b for a, b in zip(found[1].config, OWN, strict=True))
    assert changes == 1
    assert len({trial.name for trial in found}) == len(found)


def test_what_cannot_fit_is_not_tried() -> None:
    small = space.candidates(table(), "sm90", Point("keys", "half", 256, "full"))
    large = space.candidates(table(), "sm90", Point("keys", "half", 64, "full"))
    assert len(small) < len(large)
    # Keys and their two sums of 256 columns in 255 registers a thread.
    assert all(trial.config[1] < 128 for trial in small[1:])
    assert (128, 128, 8, 4) not in {
        trial.config
        for trial in space.candidates(table(), "sm90", Point("forward", "half", 256, "full"))
    }


def test_points_are_every_entry_of_the_table() -> None:
    found = space.points()
    assert len(found) == len(set(found)) == 3 * 3 * 3
    assert found[0] == POINT
    assert space.points((64,), ("keys",), ("full",), ("float32",)) == [
        Point("keys", "float32", 64, "full")
    ]


def test_the_favourite_is_found_and_written() -> None:
    gpu = Gpu()
    search = searched(gpu, space.points(directions=("forward", "queries")))
    assert search.failures == []
    new = search.new_table()
    for point in space.points(head_dims=(64, 128), directions=("forward",)):
        assert space.current(new, "sm90", point) == FAVOURITE
    # The entry that other masks fall back to is tuned as "full", and the rest is as it was.
    assert new["sm90"]["forward"]["half"]["128"]["full"] == list(FAVOURITE)
    assert new["sm90"]["keys"] == table()["sm90"]["keys"]
    assert new["sm90"]["forward"]["float32"] == table()["sm90"]["forward"]["float32"]
    assert new["sm90"]["inline_rows"] == {"64": 256, "128": 256, "256": 256}
    assert [kind for kind, _ in gpu.phases] == [tuning.TRY, tuning.TIME, tuning.PLACE]
    assert [workers for _, workers in gpu.phases] == [4, 1, 1]


def test_what_is_wrong_or_fails_never_wins() -> None:
    search = searched(Gpu(wrong=[FAVOURITE]))
    won = search.winners()[POINT]
    assert won != FAVOURITE
    assert (16, 128, 4, 1) not in {trial.config for trial in search.tried}
    assert search.failures == []


def test_a_failure_of_the_tables_own_is_told_and_nothing_replaces_it() -> None:
    search = searched(Gpu(wrong=[OWN]))
    (failure,) = search.failures
    assert "128x64 warps 8 stages 2: out of resource" in failure
    assert search.winners() == {}


@pytest.mark.parametrize("budget", [0.0, 1.0, 5.0, 20.0])
def test_the_search_keeps_to_its_time(budget: float) -> None:
    gpu = Gpu(job_seconds=0.5)
    search = searched(gpu, space.points(), budget)
    assert gpu.now <= budget + 3 * 0.5
    assert search.unfinished > 0
    for point in search.winners():
        own = Trial(point, space.current(search.table, "sm90", point))
        assert own in search.seconds[point]
    json.loads(space.dumps(search.new_table()))


def test_noise_replaces_nothing() -> None:
    own, other = Trial(POINT, OWN), Trial(POINT, FAVOURITE)
    assert space.best({own: 1.0, other: 0.985}, own) == own
    assert space.best({own: 1.0, other: 0.97}, own) == other


def test_a_search_cut_short_has_been_everywhere() -> None:
    a, b = (Trial(POINT, (rows, 64, 8, 2)) for rows in (64, 128))
    assert space.in_turn([[a, b], [b], []]) == [a, b, b]


def test_inline_wins_up_to_the_first_loss() -> None:
    assert space.inline_rows({}) == 0
    assert space.inline_rows({128: (2.0, 1.0), 64: (1.0, 2.0), 256: (1.0, 2.0)}) == 64
    assert space.inline_rows({64: (2.0, 1.0)}) == 0


def test_the_table_is_written_with_a_configuration_a_line() -> None:
    new = space.updated(table(), "sm90", {POINT: FAVOURITE}, {})
    text = space.dumps(new)
    assert json.loads(text) == new
    assert '"causal": [64, 128, 8, 3]' in text
    assert table()["sm90"]["forward"]["half"]["128"].get("causal") is None


def test_a_trial_changes_the_table_while_it_runs_and_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = table()

    configs = SimpleNamespace(table=lambda: content)
    seen: list[Any] = []

    def compare(point: Point, _settings: object) -> str:
        seen.append(space.current(content, "sm90", point))
        return "result 0 is off by 0.700"

    monkeypatch.setattr(tuning, "configs", lambda: configs)
    monkeypatch.setattr(tuning, "_compare", compare)
    trial = Trial(POINT, FAVOURITE)
    result = tuning.run_job(
        Job(tuning.TRY, trial.name, 1.0, payload=trial), Settings("cpu", tiny=True)
    )
    assert result == {"wrong": "result 0 is off by 0.700"}
    assert seen == [FAVOURITE]
    assert content == table()


@pytest.mark.parametrize(("direction", "placements"), [("forward", 2), ("keys", 1)])
def test_a_trial_of_forward_mixes_in_both_places(
    monkeypatch: pytest.MonkeyPatch, direction: str, placements: int
) -> None:
    seen: list[str | None] = []

    def difference(_point: Point, _call: object, _settings: object) -> str:
        seen.append(os.environ.get("RESFORMER_MIX"))
        return "" if len(seen) < placements else "result 0 is off by 0.700"

    monkeypatch.setattr(tuning, "_difference", difference)
    monkeypatch.setattr(tuning, "_call", lambda *_: None)
    point = Point(direction, "half", 64, "causal")
    assert tuning._compare(point, Settings("cpu", tiny=True)) == "result 0 is off by 0.700"
    assert seen == (["inline", "prologue"] if placements == 2 else [None])

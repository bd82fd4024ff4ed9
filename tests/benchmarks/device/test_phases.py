"""Phases against the clock: what one does not reach comes after the others had their turn."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.device.common import Settings
from benchmarks.device.plan import Phase
from benchmarks.device.record import DeviceRun
from benchmarks.device.run import Call, run
from benchmarks.supervisor import Job

PAUSE = 1.5
WORKER = f"""
import sys, time
from multiprocessing.connection import Connection
channel = Connection(int(sys.argv[-1]))
channel.send({{"ready": True}})
while True:
    channel.recv()
    time.sleep({PAUSE})
    channel.send({{"done": {{}}}})
"""


@pytest.fixture
def found() -> DeviceRun:
    return DeviceRun({}, {}, "sm90")


def go(found: DeviceRun, folder: Path, minutes: float, first: float = PAUSE / 2) -> list[str]:
    """Run two phases, the first of which has too little time; the phases as they were begun."""
    program = folder / "worker.py"
    program.write_text(WORKER)
    jobs = {name: [Job("test", f"{name}{i}", 30.0) for i in range(3)] for name in "ab"}
    phases = [
        Phase("a", lambda _: jobs["a"], first),
        Phase("b", lambda _: jobs["b"][:1], 60.0),
    ]
    told: list[str] = []

    def progress(_run: DeviceRun, phase: str, done: int, _total: int) -> None:
        if done == 0:
            told.append(phase)

    path = folder / "run.json"
    run(found, Call(Settings("cpu"), phases, path, progress, worker=(str(program),)), minutes)
    assert json.loads(path.read_text())["done"] == found.done
    return told


def test_a_phase_whose_time_is_up_waits_for_the_others(found: DeviceRun, tmp_path: Path) -> None:
    assert go(found, tmp_path, 2.0) == ["a", "b", "a"]
    assert list(found.done) == ["test a0", "test b0", "test a1", "test a2"]
    assert found.unfinished == []
    assert list(found.seconds) == ["a", "b"]


def test_a_call_ends_in_time_and_the_next_one_goes_on(found: DeviceRun, tmp_path: Path) -> None:
    begun = time.monotonic()
    go(found, tmp_path, 2.5 * PAUSE / 60, first=60.0)
    assert time.monotonic() - begun < 2.5 * PAUSE + 10
    before = dict(found.done)
    assert found.unfinished
    assert go(found, tmp_path, 2.0)
    assert found.unfinished == []
    assert before.items() <= found.done.items()
    assert len(found.calls) == 2
    # Time spent in the first call counts for its phases.
    assert found.seconds["a"] >= 3 * PAUSE - 0.5

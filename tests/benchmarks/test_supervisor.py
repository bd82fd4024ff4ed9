"""Jobs in processes that crash and hang: a worker that does as its job's name says."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.supervisor import Job, Outcome, Pool, without

WORKER = """
import os, pathlib, signal, subprocess, sys, time
from multiprocessing.connection import Connection
channel = Connection(int(sys.argv[-1]))
print("hello from", os.getpid(), flush=True)
if "--broken" in sys.argv:
    sys.exit("no such device")
channel.send({"ready": True})
while True:
    job = channel.recv()
    for part in job["name"].split():
        if part in job["without"]:
            continue
        channel.send({"at": part})
        if part == "crash":
            print("about to crash", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        elif part == "hang":
            time.sleep(60)
        elif part == "leave":
            sys.exit(3)
        elif part.startswith("spawn:"):
            child = subprocess.Popen(["sleep", "60"])
            pathlib.Path(part.removeprefix("spawn:")).write_text(str(child.pid))
        elif part == "pause":
            time.sleep(0.3)
        elif part in ("error", "fatal"):
            channel.send({"error": "something was wrong", "fatal": part == "fatal"})
            if part == "fatal":
                sys.exit(1)
            break
    else:
        channel.send({"done": {"by": os.getpid()}})
"""


@pytest.fixture
def command(tmp_path: Path) -> tuple[str, ...]:
    program = tmp_path / "worker.py"
    program.write_text(WORKER)
    return (sys.executable, str(program))


def outcomes(
    command: tuple[str, ...],
    names: list[str],
    *,
    workers: int = 1,
    seconds: float = 5.0,
    budget: float = 60.0,
    retry: bool = False,
    ready: Callable[[Job], Job | None] = lambda job: job,
) -> dict[str, list[Outcome]]:
    found: dict[str, list[Outcome]] = {}

    def note(outcome: Outcome) -> Job | None:
        found.setdefault(outcome.job.name, []).append(outcome)
        again = retry and outcome.result is None and outcome.at
        return without(outcome.job, outcome.at) if again else None

    jobs = [Job("test", name, seconds) for name in names]
    until = time.monotonic() + budget
    with closing(Pool(command)) as pool:
        pool.do(jobs, workers=workers, until=until, on_outcome=note, ready=ready)
    return found


def test_one_process_does_many_jobs(command: tuple[str, ...]) -> None:
    found = outcomes(command, ["a", "b", "c"])
    by = {outcome.result["by"] for (outcome,) in found.values() if outcome.result}
    assert len(found) == 3
    assert len(by) == 1


def test_several_processes_share_them(command: tuple[str, ...]) -> None:
    found = outcomes(command, [f"pause {i}" for i in range(6)], workers=3)
    assert len({outcome.result["by"] for (outcome,) in found.values() if outcome.result}) == 3


def test_an_error_leaves_the_process_in_use(command: tuple[str, ...]) -> None:
    found = outcomes(command, ["a", "error", "b"])
    (error,) = found["error"]
    assert (error.error, error.at, error.lost) == ("something was wrong", "error", False)
    assert found["a"][0].result == found["b"][0].result


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("crash", "its process died (SIGSEGV): hello from"),
        ("leave", "its process died (exit code 3)"),
        ("fatal", "something was wrong"),
        ("hang", "not done after 1 s"),
    ],
)
def test_a_lost_process_is_replaced(command: tuple[str, ...], name: str, told: str) -> None:
    found = outcomes(command, ["a", f"x {name} y", "b"], seconds=1.0)
    (lost,) = found[f"x {name} y"]
    assert lost.error.startswith(told)
    assert lost.at == name
    assert lost.lost == (name != "fatal")
    assert lost.fatal == (name == "fatal")
    assert not lost.unfinished
    assert found["b"][0].result
    assert found["a"][0].result != found["b"][0].result


def test_a_job_is_done_again_without_the_part_that_broke_it(command: tuple[str, ...]) -> None:
    found = outcomes(command, ["a crash b leave c"], retry=True)
    first, second, third = found["a crash b leave c"]
    assert "about to crash" in first.error
    assert (first.at, second.at) == ("crash", "leave")
    assert third.result
    assert third.job.without == ("crash", "leave")


def test_the_end_of_the_time_is_nobodys_fault(command: tuple[str, ...]) -> None:
    begun = time.monotonic()
    found = outcomes(command, ["a", "hang", "b"], seconds=30.0, budget=2.0)
    assert time.monotonic() - begun < 10
    assert found["a"][0].result
    assert found["hang"][0].unfinished
    assert found["b"][0].unfinished


def test_a_worker_that_never_starts_is_given_up(command: tuple[str, ...]) -> None:
    found = outcomes((*command, "--broken"), ["a", "b", "c", "d", "e"])
    told = [outcome.error for (outcome,) in found.values()]
    assert all("no such device" in error for error in told[:3])
    assert told[3:] == ["its process does not start"] * 2
    # Nobody's fault: there may be a device again the next time.
    assert [outcome.unfinished for (outcome,) in found.values()] == [False] * 3 + [True] * 2


def test_an_exception_ends_every_process(command: tuple[str, ...]) -> None:
    def interrupt(_outcome: Outcome) -> None:
        raise RuntimeError("stop")

    jobs, until = [Job("test", "a", 5.0)], time.monotonic() + 5
    with pytest.raises(RuntimeError, match="stop"), closing(Pool(command)) as pool:
        pool.do(jobs, workers=1, until=until, on_outcome=interrupt)


def test_jobs_are_asked_for_when_their_turn_comes(command: tuple[str, ...]) -> None:
    seen: list[str] = []

    def ready(job: Job) -> Job | None:
        seen.append(job.name)
        return None if "b" in job.name else without(job, "crash")

    found = outcomes(command, ["a crash", "b crash", "c"], ready=ready)
    assert seen == ["a crash", "b crash", "c"]
    assert [outcome.result is not None for (outcome,) in found.values()] == [True, True]
    assert list(found) == ["a crash", "c"]


def test_processes_stay_from_one_list_to_the_next(command: tuple[str, ...]) -> None:
    by: list[list[int]] = []

    def note(outcome: Outcome) -> None:
        assert outcome.result is not None
        by[-1].append(outcome.result["by"])

    with closing(Pool(command)) as pool:
        for workers in (3, 1):
            by.append([])
            jobs = [Job("test", f"pause {i}", 5.0) for i in range(3)]
            until = time.monotonic() + 30
            pool.do(jobs, workers=workers, until=until, on_outcome=note)
        first, second = map(set, by)
        assert len(first) == 3
        assert len(second) == 1
        assert second < first
        # Those that were not asked for are gone, with what they held.
        for process in first - second:
            with pytest.raises(ProcessLookupError):
                os.kill(process, 0)


def test_what_a_process_started_ends_with_it(command: tuple[str, ...], tmp_path: Path) -> None:
    at = tmp_path / "child"
    found = outcomes(command, [f"spawn:{at} hang"], seconds=2.0)
    assert found[f"spawn:{at} hang"][0].lost
    child = int(at.read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{child}").exists():
        state = Path(f"/proc/{child}/stat").read_text().split()[2]
        if state == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{child}").exists()

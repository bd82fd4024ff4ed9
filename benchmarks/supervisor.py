"""Run jobs in processes that may crash or hang, against the clock.

A worker is a program that is told to open the file descriptor of its last argument and to write
JSON there, a line each: {"ready": true} when it can take jobs, and for each job that it reads from
its standard input, a line of JSON too: {"at": what} when it begins a part, then {"done": result} or
{"error": text, "fatal": bool}; after a fatal error it is started anew.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import IO, Any

_TAIL = 600
_STARTS = 3
"""Failed starts of a worker before it is given up."""


@dataclass(frozen=True)
class Job:
    """Something for a worker to do, in at most `seconds`."""

    kind: str
    name: str
    seconds: float
    without: tuple[str, ...] = ()
    """Parts of it to leave out."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its result, or why it has none."""

    job: Job
    result: dict[str, Any] | None = None
    error: str = ""
    at: str = ""
    """The part that was under way."""
    lost: bool = False
    """Whether the process died, or was killed because the job's time was up."""
    unfinished: bool = False
    """Whether the time of the whole run was up: nobody's fault."""


class Worker:
    """One process, started when it is needed."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], start_seconds: float = 120.0
    ) -> None:
        self._command = command
        self._environment = environment
        self._start_seconds = start_seconds
        self._process: subprocess.Popen[str] | None = None
        self._channel = -1
        self._buffer = b""
        self.failed_starts = 0
        self._output: IO[bytes] | None = None

    def run(self, job: Job, until: float) -> Outcome:
        """Do `job`; by the clock `time.monotonic()`, no later than `until`."""
        if self._process is None:
            self._start()
            ready = self._message(min(until, time.monotonic() + self._start_seconds))
            if ready is None:
                self.failed_starts += 1
                return self._lost(job, "", until)
        assert self._process is not None
        assert self._process.stdin is not None
        at = ""
        deadline = min(until, time.monotonic() + job.seconds)
        try:
            self._process.stdin.write(json.dumps(asdict(job)) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._lost(job, at, until)
        while (message := self._message(deadline)) is not None:
            if "at" in message:
                at = message["at"]
            elif "done" in message:
                return Outcome(job, result=message["done"])
            else:
                if message["fatal"]:
                    self.close()
                return Outcome(job, error=message["error"], at=at)
        return self._lost(job, at, until)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is None:
            return
        self._process.kill()
        self._process.communicate()
        os.close(self._channel)
        if self._output is not None:
            self._output.close()
        self._process, self._channel, self._buffer = None, -1, b""

    def _start(self) -> None:
        self._channel, theirs = os.pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        self._process = subprocess.Popen(
            [*self._command, str(theirs)],
            env=dict(self._environment),
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=(theirs,),
        )
        os.close(theirs)

    def _message(self, deadline: float) -> dict[str, Any] | None:
        """The next line that the worker writes; None where none came, or the worker is gone."""
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._channel], [], [], max(0.0, left))
            if not ready:
                return None
            read = os.read(self._channel, 1 << 16)
            if not read:
                return None
            self._buffer += read
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _lost(self, job: Job, at: str, until: float) -> Outcome:
        assert self._process is not None
        if time.monotonic() >= until:
            self.close()
            return Outcome(job, error="the time was up", at=at, lost=True, unfinished=True)
        try:
            # A dying process closes its channel a moment before it is gone.
            code = self._process.wait(timeout=5 if self._gone() else 0)
        except subprocess.TimeoutExpired:
            error = f"not done after {job.seconds:.0f} s"
        else:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            error = f"its process died ({name})"
        assert self._output is not None
        self._output.seek(0)
        said = self._output.read().decode(errors="replace").strip()[-_TAIL:]
        self.close()
        return Outcome(job, error=f"{error}: {said}" if said else error, at=at, lost=True)

    def _gone(self) -> bool:
        """Whether the worker closed its channel."""
        ready, _, _ = select.select([self._channel], [], [], 0)
        return bool(ready)


def supervise(
    jobs: Sequence[Job],
    command: Sequence[str],
    *,
    workers: int,
    until: float,
    on_outcome: Callable[[Outcome], Job | None],
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Do `jobs` in order, `workers` at a time, until `until` on `time.monotonic()`'s clock.

    `on_outcome` is told of each, one at a time, and may give a job to do next: the same without the
    part that broke it, say. Jobs that time does not allow to begin are told of too.
    """
    waiting = deque(jobs)
    lock = threading.Lock()
    stop = threading.Event()
    raised: list[Exception] = []

    def serve(worker: Worker) -> None:
        try:
            take_jobs(worker)
        # Raised again below, in the thread that asked.
        except Exception as error:  # noqa: BLE001
            raised.append(error)
            stop.set()

    def take_jobs(worker: Worker) -> None:
        while not stop.is_set():
            with lock:
                if not waiting:
                    return
                job = waiting.popleft()
            if time.monotonic() >= until:
                outcome = Outcome(job, error="the time was up", unfinished=True)
            elif worker.failed_starts >= _STARTS:
                outcome = Outcome(job, error="its process does not start")
            else:
                outcome = worker.run(job, until)
            with lock:
                following = on_outcome(outcome)
                if following is not None:
                    waiting.appendleft(following)

    pool = [Worker(command, environment) for _ in range(max(1, min(workers, len(jobs))))]
    threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in pool]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        for worker in pool:
            worker.close()
    if raised:
        raise raised[0]


def without(job: Job, part: str) -> Job:
    """The same job, less a part of it."""
    return replace(job, without=(*job.without, part))

"""Run jobs in processes that may crash or hang, against the clock.

A worker is a program that opens the file descriptor in its last argument as a
`multiprocessing.connection.Connection`. It sends {"ready": True} when it can take jobs, and then
receives jobs, as dicts of `Job`'s fields. For each it sends {"at": part} when it begins a part, and
at last {"done": result} or {"error": text, "fatal": bool}; after a fatal error it is started anew.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import IO, Any

_TAIL = 600
"""Characters of a lost worker's output that are quoted."""
_STARTS = 3
"""Failed starts of a worker before it is given up."""
_TIME_UP = "the time was up"
_DEATH_SECONDS = 10.0
"""A killed process that still waits for its device after this long is left behind."""


@dataclass(frozen=True)
class Job:
    """Something for a worker to do, in at most `seconds`."""

    kind: str
    name: str
    seconds: float
    without: tuple[str, ...] = ()
    """Parts of it to leave out."""
    payload: Any = None
    """Data for the worker, which `pickle` can send."""
    family: str = ""
    """The kernels that it runs."""


@dataclass(frozen=True)
class Outcome:
    """A job's result, or why it has none."""

    job: Job
    result: dict[str, Any] | None = None
    error: str = ""
    at: str = ""
    """The part in progress."""
    lost: bool = False
    """Whether the process died, or was killed because the job's time was up."""
    fatal: bool = False
    """Whether the process could not go on after an error."""
    unfinished: bool = False
    """Whether the time of the whole run was up: no fault of the job."""


class Worker:
    """One process, started when it is needed."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], start_seconds: float = 120.0
    ) -> None:
        self._command = command
        self._environment = environment
        self._start_seconds = start_seconds
        self._failed_starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Connection
        self._output: IO[bytes]

    def run(self, job: Job, until: float) -> Outcome:
        """Do `job`; by the clock `time.monotonic()`, no later than `until`."""
        if time.monotonic() >= until:
            return Outcome(job, error=_TIME_UP, unfinished=True)
        if self._failed_starts >= _STARTS:
            return Outcome(job, error="its process does not start", unfinished=True)
        if self._process is None:
            self._process = self._start()
            if self._message(min(until, time.monotonic() + self._start_seconds)) is None:
                self._failed_starts += 1
                return self._lost(job, "", until, self._process)
        at = ""
        deadline = min(until, time.monotonic() + job.seconds)
        try:
            self._channel.send(vars(job))
        except OSError:
            return self._lost(job, at, until, self._process)
        while (message := self._message(deadline)) is not None:
            if "at" in message:
                at = message["at"]
            elif "done" in message:
                return Outcome(job, result=message["done"])
            else:
                if message["fatal"]:
                    self.close()
                return Outcome(job, error=message["error"], at=at, fatal=message["fatal"])
        return self._lost(job, at, until, self._process)

    def kill(self) -> None:
        """End the process, and those that it started, from another thread; `run` then returns."""
        process = self._process
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self.kill()
            # A process that waits inside a driver dies when the driver lets it.
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_DEATH_SECONDS)
            self._channel.close()
            self._output.close()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        self._channel, theirs = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process
        with theirs:
            return subprocess.Popen(
                [*self._command, str(theirs.fileno())],
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )

    def _message(self, deadline: float) -> dict[str, Any] | None:
        """What the worker sends next; None where nothing came in time, or the worker is gone."""
        try:
            if self._channel.poll(max(0.0, deadline - time.monotonic())):
                message: dict[str, Any] = self._channel.recv()
                return message
        except (EOFError, OSError):
            pass
        return None

    def _lost(self, job: Job, at: str, until: float, process: subprocess.Popen[bytes]) -> Outcome:
        """The outcome of a job whose process died or took too long; the process is ended."""
        if time.monotonic() >= until:
            self.close()
            return Outcome(job, error=_TIME_UP, at=at, lost=True, unfinished=True)
        try:
            # A dying process closes its channel a moment before it is gone.
            code = process.wait(timeout=5 if self._channel.poll(0) else 0)
        except subprocess.TimeoutExpired:
            error = f"not done after {job.seconds:.0f} s"
        else:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            error = f"its process died ({name})"
        self._output.seek(0)
        said = self._output.read().decode(errors="replace").strip()[-_TAIL:]
        self.close()
        return Outcome(job, error=f"{error}: {said}" if said else error, at=at, lost=True)


def _itself(job: Job) -> Job | None:
    return job


class Pool:
    """Workers that stay from one list of jobs to the next, each started when it is needed."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] = os.environ) -> None:
        self._command, self._environment = command, environment
        self._workers: list[Worker] = []

    def do(
        self,
        jobs: Sequence[Job],
        *,
        workers: int,
        until: float,
        on_outcome: Callable[[Outcome], Job | None],
        ready: Callable[[Job], Job | None] = _itself,
    ) -> None:
        """Do `jobs` in order, `workers` at a time, until `until` on `time.monotonic()`'s clock.

        `on_outcome` is told of each, one at a time, and may return a job to do next: the same
        without the part that broke it, say. It is also told of jobs that there is no time to begin.
        `ready` is asked about each when its turn comes: what to do in its place, or None to leave
        it out. Workers beyond those asked for are ended first: they may hold memory.
        """
        waiting = deque(jobs)
        lock, stop = threading.Lock(), threading.Event()

        def following() -> Job | None:
            while waiting:
                job = ready(waiting.popleft())
                if job is not None:
                    return job
            return None

        def serve(worker: Worker) -> None:
            while not stop.is_set():
                with lock:
                    job = following()
                if job is None:
                    return
                outcome = worker.run(job, until)
                with lock:
                    then = None if stop.is_set() else on_outcome(outcome)
                    if then is not None:
                        waiting.appendleft(then)

        pool = self._sized(max(1, min(workers, len(jobs))))
        with ThreadPoolExecutor(len(pool)) as threads:
            serving = [threads.submit(serve, worker) for worker in pool]
            try:
                for served in as_completed(serving):
                    served.result()
            finally:
                stop.set()
                # Again and again: a worker may be starting its process just now.
                while wait(serving, timeout=0.1).not_done:
                    for worker in pool:
                        worker.kill()

    def close(self) -> None:
        """End every process."""
        self._sized(0)

    def _sized(self, count: int) -> list[Worker]:
        for worker in self._workers[count:]:
            worker.close()
        missing = count - len(self._workers)
        new = [Worker(self._command, self._environment) for _ in range(missing)]
        self._workers = [*self._workers[:count], *new]
        return self._workers


def without(job: Job, part: str) -> Job:
    """The same job without one of its parts."""
    return replace(job, without=(*job.without, part))

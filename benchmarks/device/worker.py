"""The worker of `device-check` and `tune`: python -m benchmarks.device.worker SETTINGS FD.

One process does many jobs, and ends when it can no longer use the device.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.device import jobs
from benchmarks.device.common import Settings
from benchmarks.supervisor import Job
from resformer_kernels._triton import available

Run = Callable[[Job, Settings, Callable[[str], None]], dict[str, Any]]
"""run(job, settings, begin) does a job; `begin` is told each of its parts."""

_TAIL = 1500


def serve(settings: Settings, channel: Connection, run: Run = jobs.run) -> int:
    """Answer each job of `channel` by `run`. 0; 1 after an error that the device did not
    survive."""
    compiled = _listen()
    channel.send({"ready": True})
    while True:
        try:
            job = Job(**channel.recv())
        except EOFError:
            return 0
        compiled.clear()
        try:
            result = run(job, settings, lambda part: channel.send({"at": part}))
            settings.synchronize()
        # Whatever a kernel raises is a finding about that kernel; the run goes on.
        except Exception as error:  # noqa: BLE001
            fatal = not _survived(settings)
            channel.send({"error": _described(error), "fatal": fatal})
            if fatal:
                return 1
        else:
            channel.send({"done": {**result, "triton": dict(compiled)}})
        if torch.device(settings.device).type == "cuda":
            # The next job may be another process's.
            torch.cuda.empty_cache()


def _listen() -> Counter[str]:
    """Counts the kernels that Triton compiles in this process, and those it finds in its cache."""
    counts: Counter[str] = Counter()
    if available.interpreted() or available.version_reason() is not None:
        return counts
    triton = importlib.import_module("triton")

    def listen(*, cache_hit: bool, **_about: object) -> None:
        counts["cached" if cache_hit else "compiled"] += 1

    triton.knobs.compilation.listener = listen
    return counts


def _survived(settings: Settings) -> bool:
    """Whether the device can still be used: after an illegal access, nothing works any more."""
    try:
        settings.synchronize()
    except RuntimeError:
        return False
    return True


def _described(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).strip()
    return f"{type(error).__name__} at {where.name}: {message}"[:_TAIL]


def main(run: Run = jobs.run) -> int:
    """Serve the jobs of a `supervisor`."""
    *_, given, descriptor = sys.argv
    torch.manual_seed(0)
    with Connection(int(descriptor)) as channel:
        return serve(Settings(**json.loads(given)), channel, run)


if __name__ == "__main__":
    sys.exit(main())

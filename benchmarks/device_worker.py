"""The worker of `device-check` and `tune`: python -m benchmarks.device_worker SETTINGS FD.

One process does many jobs, and ends where the device's state is lost to it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

import torch

from benchmarks import device_jobs, tuning
from benchmarks.supervisor import Job

_TAIL = 1500


def serve(settings: device_jobs.Settings, requests: TextIO, say: Callable[..., None]) -> int:
    """Answer each line of `requests`. 0; 1 after an error that the device did not survive."""
    say(ready=True)
    for line in requests:
        fields = json.loads(line)
        job = Job(**{**fields, "without": tuple(fields["without"])})
        try:
            if job.kind.startswith("tune"):
                result = tuning.run_job(job, settings)
            else:
                result = device_jobs.run(job, settings, lambda part: say(at=part))
            settings.synchronize()
        # Whatever a kernel raises is a finding about that kernel; the run goes on.
        except Exception as error:  # noqa: BLE001
            fatal = not _survived(settings)
            say(error=_told(error), fatal=fatal)
            if fatal:
                return 1
            continue
        say(done=result)
    return 0


def _survived(settings: device_jobs.Settings) -> bool:
    """Whether the device can still be used: after an illegal access nothing works any more."""
    try:
        settings.synchronize()
    except RuntimeError:
        return False
    return True


def _told(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    message = str(error).strip()
    return f"{type(error).__name__} at {where.name}: {message}"[:_TAIL]


def main() -> int:
    """Serve jobs from standard input."""
    settings = device_jobs.Settings(**json.loads(sys.argv[1]))
    with os.fdopen(int(sys.argv[2]), "w") as channel:

        def say(**message: Any) -> None:
            channel.write(json.dumps(message) + "\n")
            channel.flush()

        torch.manual_seed(0)
        return serve(settings, sys.stdin, say)


if __name__ == "__main__":
    sys.exit(main())

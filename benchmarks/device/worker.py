"""The worker of `device-check` and `tune`: python -m benchmarks.device_worker SETTINGS FD.

One process does many jobs, and ends when it can no longer use the device.
"""

from __future__ import annotations

import json
import sys
import traceback
from multiprocessing.connection import Connection

import torch

from benchmarks import device_jobs, tuning
from benchmarks.supervisor import Job

_TAIL = 1500


def serve(settings: device_jobs.Settings, channel: Connection) -> int:
    """Answer each job of `channel`. 0; 1 after an error that the device did not survive."""
    channel.send({"ready": True})
    while True:
        try:
            job = Job(**channel.recv())
        except EOFError:
            return 0
        try:
            if job.kind.startswith("tune"):
                result = tuning.run_job(job, settings)
            else:
                result = device_jobs.run(job, settings, lambda part: channel.send({"at": part}))
            settings.synchronize()
        # Whatever a kernel raises is a finding about that kernel; the run goes on.
        except Exception as error:  # noqa: BLE001
            fatal = not _survived(settings)
            channel.send({"error": _described(error), "fatal": fatal})
            if fatal:
                return 1
        else:
            channel.send({"done": result})


def _survived(settings: device_jobs.Settings) -> bool:
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


def main() -> int:
    """Serve the jobs of a `supervisor`."""
    settings = device_jobs.Settings(**json.loads(sys.argv[1]))
    torch.manual_seed(0)
    with Connection(int(sys.argv[2])) as channel:
        return serve(settings, channel)


if __name__ == "__main__":
    sys.exit(main())

"""The worker of `device-check`, in which one family of kernels crashes and another never ends.

python planted_worker.py BACKEND SETTINGS FD; with "--raise" in place of BACKEND every native kernel
raises.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.device import jobs, worker
from benchmarks.device.common import Settings
from benchmarks.supervisor import Job

BACKEND = sys.argv[1]


def run(job: Job, settings: Settings, begin: Callable[[str], None]) -> dict[str, Any]:
    """Do a job, unless its kernels are bad ones."""
    if job.family == f"{BACKEND} mix":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job.family == f"{BACKEND} embedding":
        time.sleep(3600)
    return jobs.run(job, settings, begin)


if __name__ == "__main__":
    if BACKEND == "--raise":
        os.environ["RESFORMER_CPU"] = "sse9"
    sys.exit(worker.main(run))

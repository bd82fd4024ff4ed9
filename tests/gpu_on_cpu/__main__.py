"""`make emulate`: the package's Triton kernels on GPUs that are not there, under many schedules."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter

from tests.gpu_on_cpu import worker
from tests.gpu_on_cpu.executor import POLICIES, WHEN
from tests.gpu_on_cpu.limits import LIMITS
from tests.gpu_on_cpu.worker import Verdict

_FAMILIES = (
    ("matrix", ("mma", "wgmma", "ldmatrix", "stmatrix", "movmatrix")),
    ("copies", ("cp",)),
    ("memory", ("ld", "st", "atom", "red", "fence", "membar", "prefetch", "discard")),
    ("lanes", ("shfl", "vote", "redux", "elect", "match", "activemask")),
    ("control", ("bra", "brx", "ret", "exit", "bar", "barrier", "mbarrier", "nanosleep", "call")),
)
"""Opcodes by their first part; all others are arithmetic."""


def families(executed: dict[str, int]) -> Counter[str]:
    """Instructions by family of opcodes."""
    found: Counter[str] = Counter()
    for opcode, count in executed.items():
        first = opcode.partition(".")[0]
        names = (name for name, members in _FAMILIES if first in members)
        found[next(names, "arithmetic")] += count
    return found


def line_of(verdict: Verdict) -> str:
    """A verdict in a line, and why it is bad in more."""
    speed = verdict.steps / verdict.launched if verdict.launched else 0.0
    counts = ", ".join(f"{name} {n:,}" for name, n in families(verdict.executed).most_common())
    said = (
        f"{verdict.kind or 'ok':10} {verdict.job}: {verdict.seconds:.1f} s, {verdict.launched:.1f} "
        f"of launches, {verdict.steps:,} instructions ({speed / 1e6:.2f} million a second): "
        f"{counts}"
    )
    return said if not verdict.kind else said + "\n" + verdict.text


def main() -> int:
    """Run the cases that are asked for; returns the number of bad ones, at most 1."""
    parser = argparse.ArgumentParser(prog="make emulate", description=__doc__)
    parser.add_argument("--op", help="cases of this op alone")
    parser.add_argument("--case", default="", help="cases with this in their names")
    parser.add_argument("--arch", type=int, action="append", choices=LIMITS, help="both by default")
    parser.add_argument("--seeds", type=int, default=1, help="schedules of each case")
    parser.add_argument("--policy", choices=POLICIES, help="order of warps")
    parser.add_argument("--when", choices=WHEN, help="moment of asynchronous work")
    parser.add_argument("--edit", default="", help="module:function that changes the PTX")
    parser.add_argument("--list", action="store_true", help="name the jobs alone")
    given = parser.parse_args()
    # Triton looks at it once, when it is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    jobs = worker.jobs_of(
        given.arch or LIMITS,
        given.seeds,
        lambda case: given.op in (None, case.op) and given.case in case.full_name,
        policy=given.policy,
        when=given.when,
        edit=given.edit,
    )
    bad = 0
    for job in jobs:
        if given.list:
            sys.stdout.write(f"{job}\n")
            continue
        verdict = worker.judged(job)
        bad += verdict.kind != ""
        sys.stdout.write(line_of(verdict) + "\n")
        sys.stdout.flush()
    sys.stdout.write(f"{bad} bad\n")
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())

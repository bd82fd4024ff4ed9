"""The package's Triton kernels, as compiled for two GPUs, run by the executor.

A few cases of every op; `--emulate-all` has them all, `--seeds N` each under N schedules.
"""

from __future__ import annotations

import pytest

from resformer_kernels._triton import available
from tests.gpu_on_cpu.limits import LIMITS
from tests.gpu_on_cpu.worker import jobs_of, verdicts

pytestmark = pytest.mark.skipif(
    available.version_reason() is not None, reason=str(available.version_reason())
)
OPS = ("attention", "kvcache", "mix", "reservoir", "scan")


@pytest.mark.parametrize("op", OPS)
def test_kernels_do_nothing_undefined_and_stay_within_budget(
    op: str, request: pytest.FixtureRequest
) -> None:
    every: bool = request.config.getoption("emulate_all")
    seeds: int = request.config.getoption("seeds")
    jobs = list(jobs_of(LIMITS, seeds, lambda case: case.op == op and (every or case.quick)))
    assert jobs
    bad = [found for found in verdicts(jobs) if found.kind]
    assert not bad, "\n".join(f"{found.job}\n{found.kind}: {found.text}" for found in bad)

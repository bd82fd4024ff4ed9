"""The ceilings, at sizes that take no time."""

from __future__ import annotations

import torch

from resformer_kernels.bench.ceilings import bandwidths, gemm_rates
from resformer_kernels.bench.timing import host_timer


def test_rates_are_of_the_work_that_was_done() -> None:
    rates = gemm_rates((torch.float32, torch.bfloat16), samples=2, size=32, timer=lambda *_: 2.0)
    assert rates == {"float32": 32**3, "bfloat16": 32**3}
    found = bandwidths(samples=2, array_bytes=2**12, timer=lambda *_: 2.0)
    assert found == {"read": 2**11, "copy": 2**12}


def test_they_are_measured() -> None:
    brief = lambda call, _: host_timer(call, 1)  # noqa: E731
    assert all(r > 0 for r in gemm_rates((torch.float32,), samples=2, size=8, timer=brief).values())
    assert all(b > 0 for b in bandwidths(samples=2, array_bytes=2**12, timer=brief).values())

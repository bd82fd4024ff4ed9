"""The native kernels held against float64 over every argument, on every CPU path."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resformer_kernels.testing.kvcache import KVCacheCase, compare_kvcache
from tests.kvcache.cases import TABLE, kvcache_cases

KINDS = [
    pytest.param(dtype, quantised, id=f"{str(dtype)[6:]}{'-int8' if quantised else ''}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for quantised in (None, torch.int8)
]
by_kind = pytest.mark.parametrize(("dtype", "quantised"), KINDS)
sweep = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check(case: KVCacheCase) -> None:
    wrong = [str(row) for row in compare_kvcache(case, backend="native") if not row.ok]
    assert not wrong, f"{case}: {wrong}"


@by_kind
@pytest.mark.usefixtures("cpu_path")
@sweep
@given(data=st.data())
def test_random_cases_stay_within_budget(
    dtype: torch.dtype, quantised: torch.dtype | None, data: st.DataObject
) -> None:
    check(data.draw(kvcache_cases(dtype, quantised)))


@by_kind
@pytest.mark.usefixtures("cpu_path")
def test_edge_shapes_stay_within_budget(dtype: torch.dtype, quantised: torch.dtype | None) -> None:
    for case in TABLE.values():
        check(dataclasses.replace(case, dtype=dtype, quantised=quantised))

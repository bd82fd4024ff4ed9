"""The native kernels held against float64 over every argument, on every CPU path."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kvcache.cases import SWEEP, TABLE, check, kvcache_cases, name_of

KINDS = [
    pytest.param(dtype, quantised, id=f"{name_of(dtype)}{'-int8' if quantised else ''}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for quantised in (None, torch.int8)
]
by_kind = pytest.mark.parametrize(("dtype", "quantised"), KINDS)
sweep = settings(SWEEP, max_examples=25)


@by_kind
@pytest.mark.usefixtures("cpu_path")
@sweep
@given(data=st.data())
def test_random_cases_stay_within_budget(
    dtype: torch.dtype, quantised: torch.dtype | None, data: st.DataObject
) -> None:
    check(data.draw(kvcache_cases(dtype, quantised)), "native")


@by_kind
@pytest.mark.usefixtures("cpu_path")
def test_edge_shapes_stay_within_budget(dtype: torch.dtype, quantised: torch.dtype | None) -> None:
    for case in TABLE.values():
        check(dataclasses.replace(case, dtype=dtype, quantised=quantised), "native")

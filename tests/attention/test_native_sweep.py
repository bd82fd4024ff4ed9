"""The native kernels held against float64 over every argument, on every CPU path."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resformer_kernels.testing import BIAS_KINDS, AttentionCase, compare_case
from tests.attention.cases import TABLE, attention_cases

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
sweep = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def check(case: AttentionCase) -> None:
    wrong = [str(row) for row in compare_case(case, backend="native") if not row.ok]
    assert not wrong, f"{case}: {wrong}"


@by_dtype
@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
@pytest.mark.usefixtures("cpu_path")
@sweep
@given(data=st.data())
def test_random_cases_stay_within_budget(
    dtype: torch.dtype, packed: bool, data: st.DataObject
) -> None:
    biases = ("none",) if packed else BIAS_KINDS
    check(data.draw(attention_cases(dtype, packed, biases)))


@by_dtype
@pytest.mark.parametrize("name", TABLE)
@pytest.mark.usefixtures("cpu_path")
def test_edge_shapes_stay_within_budget(dtype: torch.dtype, name: str) -> None:
    check(dataclasses.replace(TABLE[name], dtype=dtype))

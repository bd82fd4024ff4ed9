"""The Triton kernels, in Triton's interpreter, held against float64 over every argument."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resformer_kernels._triton.available import interpreted
from tests.scan.cases import DTYPES, Case, cases, check_budget

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("interpreter"),
]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
sweep = settings(
    max_examples=6,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def short_chunks() -> Iterator[None]:
    """Time is cut where it would only be for lengths that an interpreter does not manage."""
    from resformer_kernels.scan.triton import launch as triton_launch

    with mock.patch.multiple(triton_launch, LEAST_CHUNK=4, STEPS=2):
        yield


@by_dtype
@sweep
@given(data=st.data())
def test_stays_within_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    check_budget(data.draw(cases(dtype, longest=12)), "triton")


@by_dtype
@pytest.mark.usefixtures("short_chunks")
@sweep
@given(data=st.data())
def test_chunks_stay_within_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    check_budget(data.draw(cases(dtype, longest=24)), "triton")


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("constant", [False, True])
def test_more_chunks_than_are_loaded_at_once(constant: bool) -> None:
    check_budget(Case(torch.float32, 3, batch=1, length=21, constant=constant), "triton")
    check_budget(Case(torch.float32, 3, lengths=(9, 0, 2, 11), tail=1, constant=constant), "triton")

"""The Triton kernels, in Triton's interpreter, held against float64 over every argument."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resformer_kernels._triton.available import interpreted
from tests.replaced import replaced
from tests.scan.cases import DTYPES, Case, cases, check_budget

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("interpreter"),
]

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
sweep = settings(max_examples=6)


@pytest.fixture
def short_chunks() -> Iterator[None]:
    """Chunks of time at lengths that are quick in the interpreter."""
    from resformer_kernels.scan.triton import partition

    with replaced(partition, LEAST_CHUNK=4, STEPS=4):
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
    check_budget(Case(torch.float32, 3, batch=1, length=41, constant=constant), "triton")
    packed = Case(torch.float32, 3, lengths=(19, 0, 2, 20), tail=1, constant=constant)
    check_budget(packed, "triton")

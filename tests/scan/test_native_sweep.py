"""The native kernels held against float64 over every argument, on every CPU path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.scan.cases import DTYPES, Case, cases, check_budget

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


@by_dtype
@pytest.mark.usefixtures("cpu_path")
@settings(max_examples=30)
@given(data=st.data())
def test_stays_within_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    check_budget(data.draw(cases(dtype)), "native")


@by_dtype
@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("constant", [False, True])
def test_several_blocks_of_steps_and_lanes(dtype: torch.dtype, constant: bool) -> None:
    # More channels than a thread takes at once, and sequences that end within a block of 256 steps.
    check_budget(Case(dtype, 1100, batch=1, length=300, constant=constant), "native")
    packed = Case(
        dtype, 37, lengths=(1, 255, 0, 256, 90, 257, 3), tail=2, constant=constant, reverse=True
    )
    check_budget(packed, "native")


@pytest.mark.parametrize(("batch", "length", "channels"), [(0, 3, 4), (3, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("constant", [False, True])
@by_dtype
def test_empty(
    dtype: torch.dtype, batch: int, length: int, channels: int, constant: bool, backend: str
) -> None:
    case = Case(dtype, channels, batch=batch, length=length, constant=constant)
    check_budget(case, backend)


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 5, 0)], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_empty_sequences(lengths: tuple[int, ...], reverse: bool, backend: str) -> None:
    for tail in (0, 2):
        case = Case(torch.float32, 5, lengths=lengths, tail=tail, reverse=reverse)
        check_budget(case, backend)

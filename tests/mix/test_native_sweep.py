"""The native kernels held against float64 over every argument, on every CPU path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.mix.cases import DTYPES, Case, cases, check_budget, embedding_call, values_call

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
sweep = settings(max_examples=25)


@by_dtype
@pytest.mark.usefixtures("cpu_path")
@sweep
@given(data=st.data())
def test_values_stay_within_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    check_budget(values_call, data.draw(cases(dtype)), "native")


@by_dtype
@pytest.mark.usefixtures("cpu_path")
@sweep
@given(data=st.data())
def test_embeddings_stay_within_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    check_budget(embedding_call, data.draw(cases(dtype, sources=1)), "native")


@by_dtype
@pytest.mark.usefixtures("cpu_path")
def test_long_sums_stay_within_budget(dtype: torch.dtype) -> None:
    long = Case((3, 3000), 4, 48, dtype, ("scalar", "head", "channel", "dim", "position"))
    check_budget(values_call, long, "native")
    one_token = Case((3, 3000), 4, 48, dtype, ("scalar",), vocab=1)
    check_budget(embedding_call, one_token, "native")


@by_dtype
def test_many_sources(dtype: torch.dtype, native: str) -> None:
    forms = ("float", "scalar", "head", "full") * 12 + ("token",)
    check_budget(values_call, Case((2, 9), 3, 20, dtype, forms), native)


@pytest.mark.parametrize("rows", [(0, 5), (3, 0), (0,)], ids=str)
def test_empty(rows: tuple[int, ...], backend: str) -> None:
    forms = ("float", "scalar", "head", "token", "full")
    check_budget(values_call, Case(rows, 2, 8, torch.float32, forms), backend)
    check_budget(embedding_call, Case(rows, 2, 8, torch.float32, ("scalar",)), backend)

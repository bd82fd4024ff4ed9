"""The Triton kernels, in Triton's interpreter, held against float64 over every argument."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resformer_kernels._triton.available import interpreted
from tests.mix.cases import DTYPES, FORMS, Case, cases, check_budget, embedding_call, values_call

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
sweep = settings(max_examples=15)


@by_dtype
@sweep
@given(data=st.data())
def test_values_stay_within_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    check_budget(values_call, data.draw(cases(dtype, small=True)), "triton")


@by_dtype
@sweep
@given(data=st.data())
def test_embeddings_stay_within_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    check_budget(embedding_call, data.draw(cases(dtype, sources=1, small=True)), "triton")


@by_dtype
@pytest.mark.parametrize("rows", [(2, 70), (140,), (70, 1)], ids=str)
def test_sums_over_tiles_stay_within_budget(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    forms = tuple(form for form in FORMS if form != "float")
    check_budget(values_call, Case(rows, 3, 48, dtype, forms), "triton")
    for form in ("head", "channel", "token"):
        check_budget(embedding_call, Case(rows, 3, 48, dtype, (form,), vocab=3), "triton")


def test_more_partial_sums_than_a_tile_holds() -> None:
    case = Case((1100,), 1, 64, torch.float32, ("channel", "scalar"))
    check_budget(values_call, case, "triton")


@by_dtype
def test_rows_wider_than_a_tile(dtype: torch.dtype) -> None:
    check_budget(values_call, Case((2, 3), 3, 530, dtype, FORMS), "triton")
    check_budget(embedding_call, Case((2, 3), 3, 530, dtype, ("token_head",), vocab=2), "triton")


@by_dtype
@pytest.mark.parametrize("count", [5, 33, 70])
def test_many_sources(dtype: torch.dtype, count: int) -> None:
    forms = (*("float", "scalar", "head", "full") * 18, "token")[-count:]
    check_budget(values_call, Case((2, 9), 3, 20, dtype, forms), "triton")

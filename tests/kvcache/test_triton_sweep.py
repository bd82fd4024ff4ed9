"""The Triton kernels of the cache held against float64 over every argument, in the interpreter."""

from __future__ import annotations

import dataclasses
import os
from unittest import mock

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from resformer_kernels.kvcache.triton import plan
from resformer_kernels.testing.kvcache import KVCacheCase
from tests.kvcache.cases import SWEEP, TABLE, check, kvcache_cases, name_of

pytestmark = pytest.mark.usefixtures("interpreter")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTISED = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
FEW_TOKENS = st.sampled_from((0, 1, 2, 15, 16, 17, 31, 33, 50, 64, 65, 90))
FEW_QUERIES = st.sampled_from((0, 1, 1, 1, 2, 5, 17))


by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
by_storage = pytest.mark.parametrize("stored", QUANTISED, ids=name_of)
sweep = settings(
    SWEEP,
    max_examples=int(os.environ.get("RESFORMER_TRITON_EXAMPLES", "15")),
    phases=(Phase.generate,),
)
TILES = st.builds(
    plan.Tiles,
    rows=st.sampled_from((16, 32)),
    keys=st.sampled_from((16, 32, 64)),
    warps=st.just(4),
    stages=st.just(1),
    ahead=st.booleans(),
    resident=st.just(2),
)


def check_with(tiles: plan.Tiles, case: KVCacheCase) -> None:
    with mock.patch.object(plan, "choose_tiles", return_value=tiles):
        check(case, "triton")


@by_dtype
@sweep
@given(data=st.data())
def test_random_cases_stay_within_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    cases = kvcache_cases(dtype, tokens=FEW_TOKENS, queries=FEW_QUERIES, most=2)
    case = data.draw(cases)
    check_with(data.draw(TILES), case)


@by_storage
@sweep
@given(data=st.data())
def test_random_codes_stay_within_budget(stored: torch.dtype, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    cases = kvcache_cases(dtype, stored, tokens=FEW_TOKENS, queries=FEW_QUERIES, most=2)
    case = data.draw(cases)
    check_with(data.draw(TILES), case)


# Half of the interpreter's time, and no kind of tile that other cases lack.
LONG = ("several tiles", "many splits", "prefill", "chunked prefill", "many heads")


@by_dtype
@pytest.mark.parametrize("name", TABLE)
def test_edge_shapes_stay_within_budget(dtype: torch.dtype, name: str) -> None:
    if name in LONG and dtype is torch.float16:
        pytest.skip("long for an interpreter: as bfloat16")
    check(dataclasses.replace(TABLE[name], dtype=dtype), "triton")


@by_storage
@pytest.mark.parametrize("name", ["full pages", "many splits", "prefill", "every argument"])
def test_edge_codes_stay_within_budget(stored: torch.dtype, name: str) -> None:
    check(dataclasses.replace(TABLE[name], dtype=torch.bfloat16, quantised=stored), "triton")

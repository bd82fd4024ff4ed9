"""The Triton kernels held against float64 over every argument, in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from resformer_kernels.testing import AttentionCase, compare_case
from tests.attention.cases import FEW_TOKENS, TABLE, attention_cases
from tests.attention.variants import Variant

pytestmark = pytest.mark.usefixtures("interpreter")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
sweep = settings(
    max_examples=int(os.environ.get("RESFORMER_TRITON_EXAMPLES", "10")),
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


VARIANTS = st.builds(
    Variant,
    rows=st.sampled_from((32, 64)),
    keys=st.sampled_from((16, 32, 64)),
    # Plain loads, and descriptors where the layout allows.
    capability=st.sampled_from(((8, 0), (9, 0))),
    mix=st.sampled_from(("inline", "prologue")),
)


def check(case: AttentionCase, variant: Variant) -> None:
    with variant.in_force():
        wrong = [str(row) for row in compare_case(case, backend="triton") if not row.ok]
    assert not wrong, f"{case} {variant}: {wrong}"


@by_dtype
@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
@sweep
@given(data=st.data())
def test_random_cases_stay_within_budget(
    dtype: torch.dtype, packed: bool, data: st.DataObject
) -> None:
    cases = attention_cases(dtype, packed, tokens=FEW_TOKENS, most=2)
    check(data.draw(cases), data.draw(VARIANTS))


# The longest shapes would take half of the interpreter's minutes and add no new kind of tile.
LONG = ("several tiles", "few heads, long keys", "packed, long and short", "narrow window")


@by_dtype
@pytest.mark.parametrize("name", TABLE)
def test_edge_shapes_stay_within_budget(dtype: torch.dtype, name: str) -> None:
    if name in LONG and dtype is not torch.bfloat16:
        pytest.skip("long for an interpreter: in bfloat16 alone")
    check(dataclasses.replace(TABLE[name], dtype=dtype), Variant(64, 64))

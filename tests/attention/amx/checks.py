"""The checks that run on AMX's kernels, its own or emulated: in a process of their own, through
child.py."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resformer_kernels._core import extension
from resformer_kernels.testing import BIAS_KINDS, AttentionCase, compare_case
from tests.attention.cases import TABLE, attention_cases
from tests.attention.test_native_threads import SHAPES

BF16 = torch.bfloat16
# What the tiles are cut by: the head dimension (steps of 32), rows (16), keys, and who sees what.
CUTS = {
    "D64": AttentionCase(q_len=70, k_len=230, head_dim=64, value_dim=64),
    "D80": AttentionCase(q_len=33, k_len=97, head_dim=80, value_dim=80, causal=True, sinks=True),
    "D128": AttentionCase(q_len=100, k_len=100, head_dim=128, value_dim=128, causal=True),
    "D odd": AttentionCase(q_len=47, k_len=61, head_dim=33, value_dim=17, causal=True),
    "group": AttentionCase(q_len=50, k_len=80, heads=6, kv_heads=2, head_dim=64, causal=True),
    "window": AttentionCase(q_len=150, k_len=160, head_dim=64, window=(37, 3)),
    "bias": AttentionCase(q_len=40, k_len=120, head_dim=64, bias="additive", softcap=20.0),
    "epilogue": AttentionCase(
        q_len=90, k_len=90, head_dim=64, causal=True, exclusive="token_head", out_gate="channel"
    ),
}


@pytest.fixture(autouse=True)
def path() -> None:
    assert os.environ["RESFORMER_CPU"] == extension.cpu_path() == "avx512_amx"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def check(case: AttentionCase) -> None:
    wrong = [str(row) for row in compare_case(case, backend="native") if not row.ok]
    assert not wrong, f"{case}: {wrong}"


def mixing(case: AttentionCase) -> AttentionCase:
    return dataclasses.replace(
        case, dtype=BF16, lambda_v="scalar", lambda_first="channel", return_lse=True
    )


@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_random_cases_stay_within_budget(packed: bool, data: st.DataObject) -> None:
    check(data.draw(attention_cases(BF16, packed, ("none",) if packed else BIAS_KINDS)))


# Signals cost microseconds: one long sequence in short windows, packed, stands for the others.
EDGES = [name for name in TABLE if "segments" not in name or name == "window in segments, packed"]


@pytest.mark.parametrize("name", EDGES)
def test_edge_shapes_stay_within_budget(name: str) -> None:
    check(dataclasses.replace(TABLE[name], dtype=BF16))


@pytest.mark.parametrize("name", CUTS)
def test_cuts_stay_within_budget(name: str) -> None:
    check(mixing(CUTS[name]))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("threads")
def test_a_call_cut_among_threads_stays_within_budget(name: str) -> None:
    check(mixing(SHAPES[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_take_the_build_below(dtype: torch.dtype) -> None:
    check(dataclasses.replace(CUTS["D80"], dtype=dtype))

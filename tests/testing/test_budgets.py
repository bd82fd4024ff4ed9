"""The error budgets catch wrong kernels and pass right ones; poison reaches what it should."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import value_residual_attention
from resformer_kernels.testing import (
    REPRESENTATIVE,
    AttentionCase,
    attention_inputs,
    compare,
    compare_case,
    poisoned,
)


class Broken:
    """value_residual_attention, whose backend "broken" makes one mistake."""

    def __init__(self, **mistakes: Any) -> None:
        self.mistakes = mistakes

    __resformer_explainable__ = True

    def __call__(self, backend: str = "auto", **arguments: Any) -> Any:
        if backend != "broken":
            return value_residual_attention(**arguments, backend=backend)
        mistakes = dict(self.mistakes)
        factor = mistakes.pop("factor", 1.0)
        out: Tensor = value_residual_attention(**{**arguments, **mistakes}, backend="reference")
        return out * factor


def wrong(function: Any, case: AttentionCase, backend: str) -> set[str]:
    inputs = attention_inputs(case)
    rows = compare(function, inputs.tensors, inputs.options, inputs.grads, backend=backend)
    return {row.name for row in rows if not row.ok}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_is_within_its_own_budget(dtype: torch.dtype) -> None:
    case = AttentionCase(dtype=dtype, lambda_v="scalar", lambda_first="head", sinks=True)
    assert not wrong(Broken(), case, "broken")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "mistakes",
    [{"causal": False}, {"scale": 0.26}, {"softcap": 10.0}, {"lambda_v": 0.73}],
)
def test_a_wrong_argument_is_caught(dtype: torch.dtype, mistakes: dict[str, Any]) -> None:
    case = AttentionCase(dtype=dtype, causal=True, sinks=True, scale=0.25)
    assert "out" in wrong(Broken(**mistakes), case, "broken")


def test_a_few_roundings_too_many_are_caught() -> None:
    unit = torch.finfo(torch.float32).eps / 2
    case = AttentionCase(causal=True)
    assert "out" in wrong(Broken(factor=1 + 16 * unit), case, "broken")


def test_representative_cases_touch_everything() -> None:
    for field in ("sinks", "causal", "return_lse", "return_mixed_value", "tail"):
        assert {bool(getattr(case, field)) for case in REPRESENTATIVE} == {True, False}
    assert {case.sources for case in REPRESENTATIVE} == {"both", "v", "v_first"}


@pytest.mark.parametrize("case", REPRESENTATIVE)
def test_representative_cases_pass(case: AttentionCase) -> None:
    assert all(row.ok for row in compare_case(case, backend="auto"))


def test_poison() -> None:
    before = os.environ.get("RESFORMER_POISON")
    with poisoned():
        assert os.environ["RESFORMER_POISON"] == "1"
        assert torch.empty(3).isnan().all()
        assert torch.zeros(2).new_empty(3).isnan().all()
        assert torch.empty_like(torch.zeros(2)).isnan().all()
        assert not torch.zeros(3).isnan().any()
    assert os.environ.get("RESFORMER_POISON") == before

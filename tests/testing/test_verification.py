"""The table of checks, and that it catches a wrong kernel."""

from __future__ import annotations

import pytest
import torch

from resformer_kernels.mix import native as native_mix
from resformer_kernels.mix import reference as reference_mix
from resformer_kernels.testing.verification import Check, Verdict, checks, verify


def mixes() -> list[Check]:
    return [check for check in checks([torch.float32]) if check.op.startswith("mix")]


def test_table_names_every_op_in_each_dtype() -> None:
    table = checks()
    assert {check.op for check in table} == {
        "value_residual_attention",
        "value_residual_attention_varlen",
        "attention_with_kvcache",
        "mix_values",
        "mix_value_embedding",
    }
    assert {check.dtype for check in table} == {"float32", "bfloat16", "float16"}
    assert len({(check.op, check.dtype, check.case) for check in table}) == len(table)


def test_mixes_are_within_their_budgets(backend: str) -> None:
    verdicts = [verdict for found in verify(mixes(), backend) for verdict in found]
    assert {v.tensor.split("[")[0] for v in verdicts} == {
        *("out", "dv", "dcoefficient", "dtable", "dgate")
    }
    assert [v for v in verdicts if not v.ok] == []


def test_a_wrong_result_is_over_budget(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_mix, "run", lambda call: 1.00001 * reference_mix.run(call))
    verdicts = [verdict for found in verify(mixes(), native) for verdict in found]
    assert [v for v in verdicts if v.tensor == "out" and v.ok] == []


def test_share_of_a_zero_budget() -> None:
    assert Verdict("op", "case", "float32", "out", 0.0, 0.0).share == 0.0
    assert Verdict("op", "case", "float32", "out", 1.0, 0.0).share == float("inf")

"""exclusive and out_gate behind FlashAttention's kernels, which are faked on a CPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from resformer_kernels import explain, value_residual_attention
from resformer_kernels.testing import attention_inputs, compare_case
from tests.attention.epilogues import EPILOGUES
from tests.attention.fake_flash_attn import Install

BF16 = torch.bfloat16


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("module", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_an_epilogue_is_a_pass_of_ours(install: Install, module: str, name: str) -> None:
    fake = install(module)
    case = dataclasses.replace(EPILOGUES[name], dtype=BF16)
    wrong = [str(row) for row in compare_case(case, backend="flash_attn") if not row.ok]
    assert not wrong
    assert fake.calls
    inputs = attention_inputs(case)
    found = explain(inputs.function, **inputs.tensors, **inputs.options, backend="flash_attn")
    assert "exclusive and out_gate are a pass over its output" in found.notes[1]


@pytest.mark.usefixtures("interpreter")
def test_a_gate_of_zeros_has_a_gradient(install: Install) -> None:
    install()
    q, k, v = (torch.randn(1, 9, 2, 16, dtype=BF16, requires_grad=True) for _ in range(3))
    gate = torch.zeros(1, 9, 2, 1, requires_grad=True)
    leaves, found = (q, k, v, gate), []
    for backend in ("flash_attn", "reference"):
        out = value_residual_attention(q, k, v, exclusive=0.5, out_gate=gate, backend=backend)
        found.append(torch.autograd.grad(out.float().sum(), leaves))
    torch.testing.assert_close(*found, atol=0.03, rtol=0.03)
    assert found[0][-1].all()


@pytest.mark.usefixtures("interpreter")
def test_an_epilogue_has_no_second_derivative(install: Install) -> None:
    install()
    q = torch.randn(1, 5, 2, 16, dtype=BF16, requires_grad=True)
    out = value_residual_attention(q, q, q, exclusive=1.0, backend="flash_attn")
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        torch.autograd.grad(dq.sum(), q)


def test_an_epilogue_needs_triton(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q = torch.randn(1, 5, 2, 16, dtype=BF16)
    told = "exclusive and out_gate need a Triton kernel here: "
    for given in ({"exclusive": 1.0}, {"out_gate": torch.ones(2, 1)}):
        with pytest.raises(RuntimeError, match=told):
            value_residual_attention(q, q, q, **given, backend="flash_attn")
    value_residual_attention(q, q, q, exclusive=0.0, backend="flash_attn")

"""The `flash_attn` backend, over packages that are faked on a CPU."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from resformer_kernels import (
    explain,
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels._core.hardware import MACHINE
from resformer_kernels._core.select import prepare
from resformer_kernels.attention import flash_attn
from resformer_kernels.testing import AttentionCase, attention_inputs, compare_case
from tests.attention.cases import TABLE, attention_cases
from tests.attention.fake_flash_attn import Install

BF16 = torch.bfloat16


def serves(case: AttentionCase) -> bool:
    inputs = attention_inputs(case)
    leaves = {
        name: x.requires_grad_() if x.is_floating_point() and x.is_leaf else x
        for name, x in inputs.tensors.items()
    }
    request = prepare(inputs.function, **leaves, **inputs.options, backend="flash_attn")
    return flash_attn.unsupported_reason(request.call, MACHINE) is None


def check(case: AttentionCase) -> None:
    wrong = [str(row) for row in compare_case(case, backend="flash_attn") if not row.ok]
    assert not wrong, f"{case}: {wrong}"


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_random_cases_stay_within_budget(
    install: Install, module: str, packed: bool, data: st.DataObject
) -> None:
    install(module)
    case = data.draw(attention_cases(BF16, packed, ("none",), epilogues=False))
    dims = data.draw(st.sampled_from((8, 12, 16, 64)))
    case = dataclasses.replace(
        case, head_dim=dims, value_dim=dims, sinks=False, return_lse=False, bias="none"
    )
    assume(serves(case))
    check(case)


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TABLE)
def test_edge_shapes_stay_within_budget_or_are_refused(
    install: Install, module: str, dtype: torch.dtype, name: str
) -> None:
    install(module)
    case = dataclasses.replace(
        TABLE[name], dtype=dtype, sinks=False, bias="none", return_lse=False, value_dim=16
    )
    case = dataclasses.replace(case, head_dim=16)
    if serves(case):
        check(case)
    else:
        assert name in ("no queries", "no keys", "no batch", "packed, no sequence")


@pytest.mark.parametrize("module", ["flash_attn", "flash_attn_interface"])
@pytest.mark.parametrize(
    "lengths", [None, ((5, 9), (0, 3), (7, 0), (40, 40))], ids=["fixed", "packed"]
)
def test_the_lse_is_that_of_the_contract(
    install: Install, module: str, lengths: tuple[tuple[int, int], ...] | None
) -> None:
    fake = install(module)
    case = AttentionCase(
        dtype=BF16, q_len=40, k_len=23, causal=True, return_lse=True, lengths=lengths, tail=3
    )
    inputs = attention_inputs(case)
    with torch.no_grad():
        got = inputs.function(**inputs.tensors, **inputs.options, backend="flash_attn")
        true = inputs.function(**inputs.tensors, **inputs.options, backend="reference")
    assert fake.calls
    # V' may be rounded another way where it is mixed first.
    torch.testing.assert_close(got[0], true[0], atol=0.02, rtol=0.02)
    torch.testing.assert_close(got[1], true[1])
    assert (true[1] == -torch.inf).any()


def test_nan_reaches_the_lse(install: Install) -> None:
    install()
    q, k, v = torch.randn(3, 1, 6, 2, 8, dtype=BF16)
    q[0, 2, 1] = torch.nan
    out, lse = value_residual_attention(q, k, v, return_lse=True, backend="flash_attn")
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 2, 1]]
    assert lse.isnan().nonzero().tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("window", "causal", "passed"),
    [
        ((-1, -1), False, (False, (-1, -1))),
        ((-1, -1), True, (True, (-1, -1))),
        ((-1, 0), False, (True, (-1, -1))),
        ((4, 0), False, (True, (4, -1))),
        ((4, 3), True, (True, (4, -1))),
        ((4, 3), False, (False, (4, 3))),
        ((99, 99), False, (False, (-1, -1))),
        ((99, 3), False, (False, (-1, 3))),
        ((4, 99), False, (False, (4, -1))),
    ],
)
def test_windows_are_mapped(
    install: Install,
    window: tuple[int, int],
    causal: bool,
    passed: tuple[bool, tuple[int, int]],
) -> None:
    fake = install()
    q, k, v = torch.randn(3, 1, 20, 2, 8, dtype=BF16)
    value_residual_attention(q, k, v, window=window, causal=causal, backend="flash_attn")
    assert (fake.calls[0]["causal"], fake.calls[0]["window"]) == passed


def test_the_mixed_value_is_fresh_and_differentiable(install: Install) -> None:
    install()
    for sources in ("both", "v", "v_first"):
        check(AttentionCase(dtype=BF16, sources=sources, return_mixed_value=True))
        v = torch.randn(1, 5, 1, 8, dtype=BF16)
        _, mixed = value_residual_attention(v, v, v, return_mixed_value=True, backend="flash_attn")
        assert mixed.data_ptr() != v.data_ptr()


def test_second_derivatives_raise(install: Install) -> None:
    install()
    q, k, v = (torch.randn(1, 5, 2, 8, dtype=BF16, requires_grad=True) for _ in range(3))
    out = value_residual_attention(q, k, v, backend="flash_attn")
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        torch.autograd.grad(dq.sum(), q)


def refusal(install: Install | None = None, module: str = "flash_attn", **case: Any) -> str:
    """Why a call that is otherwise fine is refused."""
    if install is not None:
        install(module)
    given: dict[str, Any] = {"dtype": BF16, **case}
    inputs = attention_inputs(AttentionCase(**given))
    with pytest.raises(RuntimeError, match="cannot serve this call") as caught:
        inputs.function(**inputs.tensors, **inputs.options, backend="flash_attn")
    return str(caught.value)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ({"dtype": torch.float32}, "bfloat16 and float16, these are torch.float32"),
        ({"bias": "mask"}, "attn_bias"),
        ({"sinks": True}, "sinks"),
        ({"head_dim": 8}, "these have 16 and q has 8"),
        ({"head_dim": 264, "value_dim": 264}, "at most 256, this is 264"),
        ({"scale": -0.5}, "no scale of 0 or less (-0.5)"),
        ({"scale": 0.0}, "no scale of 0 or less (0.0)"),
        ({"q_len": 0}, "empty tensors"),
        ({"batch": 0}, "empty tensors"),
        ({"window": (3, -1), "q_len": 60}, "open to the right"),
        ({"window": (3, 50), "q_len": 60}, "open to the right"),
    ],
)
def test_what_it_cannot_serve_has_a_reason(
    install: Install, case: dict[str, Any], reason: str
) -> None:
    assert reason in refusal(install, **case)


def test_a_gradient_of_the_lse_is_refused(install: Install) -> None:
    install()
    q = torch.randn(1, 5, 2, 8, dtype=BF16, requires_grad=True)
    with pytest.raises(RuntimeError, match="LSE has no gradient"):
        value_residual_attention(q, q, q, return_lse=True, backend="flash_attn")


def test_limits_of_version_3(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    three = "flash_attn_interface"
    assert "multiple of 8, this is 12" in refusal(install, three, head_dim=12, value_dim=12)
    q = torch.randn(1, 5, 2, 256, dtype=BF16, requires_grad=True)
    with pytest.raises(RuntimeError, match="deterministic backward has no head_dim of 256"):
        value_residual_attention(q, q, q, backend="flash_attn")
    with torch.no_grad():
        value_residual_attention(q, q, q, backend="flash_attn")
    # What version 2 gets wrong is right here.
    check(AttentionCase(dtype=BF16, window=(3, -1), q_len=60))
    monkeypatch.setattr(MACHINE, "capability", lambda _device: (8, 0))
    assert "compute capability 9.0" in refusal()


@pytest.mark.parametrize(
    ("without", "case", "reason"),
    [
        ("LOCAL", {"window": (3, 2)}, "built without LOCAL"),
        ("SOFTCAP", {"softcap": 5.0}, "built without SOFTCAP"),
        ("FP16", {"dtype": torch.float16}, "built without FP16"),
        ("VARLEN", {"lengths": ((3, 3),)}, "built without VARLEN"),
        ("HDIM256", {"head_dim": 200, "value_dim": 200}, "built without a head_dim of 200"),
    ],
)
def test_what_a_build_left_out_is_named(
    install: Install, without: str, case: dict[str, Any], reason: str
) -> None:
    install("fa3_fwd_interface", (without,))
    assert f"fa3_fwd_interface: it was {reason}" in refusal(**case)


def test_the_first_package_that_fits_serves(install: Install) -> None:
    forward_only = install("fa3_fwd_interface", ("BACKWARD", "LOCAL", "FP16"))
    two = install("flash_attn")
    q = torch.randn(1, 5, 2, 16, dtype=BF16)
    found = explain(value_residual_attention, q, q, q, q, backend="flash_attn")
    assert found.backend == "flash_attn"
    assert found.notes[0] == "fa3_fwd_interface serves it"
    value_residual_attention(q, q, q, q, backend="flash_attn")
    assert (len(forward_only.calls), len(two.calls)) == (1, 0)
    q.requires_grad_()
    value_residual_attention(q, q, q, q, backend="flash_attn").sum().backward()
    assert (len(forward_only.calls), len(two.calls)) == (1, 1)


def test_explain_tells_of_copies(install: Install) -> None:
    install()
    q, k, v = torch.randn(3, 1, 5, 2, 17, dtype=BF16)[..., 1:].unbind()
    found = explain(value_residual_attention, q, k, v, backend="flash_attn")
    assert [note.split()[0] for note in found.notes] == ["flash_attn", "q", "k", "v"]
    cu = torch.tensor([0, 5], dtype=torch.int32)
    packing = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 5, "max_seqlen_k": 5}
    x = q[0].contiguous()
    found = explain(value_residual_attention_varlen, x, x, x, x, **packing, backend="flash_attn")
    assert "zeros after the last sequence" in found.notes[-1]


def _constant(value: Any) -> Callable[..., Any]:
    def answer(*_arguments: Any) -> Any:
        return value

    answer._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return answer


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_compiles_without_a_graph_break(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install()
    monkeypatch.setattr(flash_attn, "_device_reason", _constant(None))
    monkeypatch.setattr(MACHINE, "capability", _constant((9, 0)))

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        deterministic: bool,
        return_attn_probs: bool,
    ) -> tuple[Tensor, Tensor]:
        assert deterministic
        assert return_attn_probs
        assert (window_size, softcap) == ((-1, -1), 0.0)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale)
        return out.transpose(1, 2), q.new_zeros(())

    module: Any = ModuleType("flash_attn")
    module.flash_attn_func = module.flash_attn_varlen_func = attend
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    compiled = torch.compile(value_residual_attention, fullgraph=True, backend="aot_eager")
    for length in (16, 24, 40):
        leaves = [torch.randn(1, length, 2, 8, dtype=BF16, requires_grad=True) for _ in range(4)]
        q, k, v, v_first = leaves
        gate = torch.tensor(0.3, requires_grad=True)
        grads = []
        for call, backend in ((compiled, "flash_attn"), (value_residual_attention, "reference")):
            out = call(q, k, v, v_first, gate, 0.5, causal=True, backend=backend)
            grads.append(torch.autograd.grad(out.float().square().sum(), [*leaves, gate]))
        torch.testing.assert_close(*grads, atol=0.1, rtol=0.05)


def test_without_a_package_each_is_named(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    del install
    for module in ("flash_attn", "flash_attn_interface", "fa3_fwd_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    text = refusal()
    for module in ("flash_attn_interface", "fa3_fwd_interface", "flash_attn"):
        assert f"{module}: it " in text


def test_a_package_that_is_broken_or_strange_is_refused(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install()
    module: Any = fake.module("flash_attn")
    module.flash_attn_func = lambda q, k, v, softmax_scale, causal: None  # noqa: ARG005
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    assert "takes no window_size, softcap, deterministic, return_attn_probs" in refusal()

    def broken(_name: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(MACHINE, "packages", {})
    monkeypatch.setattr("importlib.import_module", broken)
    assert "flash_attn: it does not import: undefined symbol" in refusal()


def test_other_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "runs on CUDA tensors, these are on cpu" in refusal()
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in str(flash_attn._device_reason(device, MACHINE))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert "8.0 or newer, cuda:1 has 7.5" in str(flash_attn._device_reason(device, MACHINE))
    assert "mps" in str(flash_attn._device_reason(torch.device("mps"), MACHINE))

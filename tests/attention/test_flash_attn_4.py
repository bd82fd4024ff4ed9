"""FlashAttention 4 behind the `flash_attn` backend, over a package that is faked on a CPU."""

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

from resformer_kernels import value_residual_attention, value_residual_attention_varlen
from resformer_kernels._core.hardware import MACHINE
from resformer_kernels._core.select import prepare
from resformer_kernels.attention import flash_attn
from resformer_kernels.attention.flash_attn import four
from resformer_kernels.testing import AttentionCase, attention_inputs, compare_case
from tests.attention.cases import TABLE, attention_cases
from tests.attention.epilogues import EPILOGUES
from tests.attention.fake_flash_attn_4 import MODULE, Fake4

BF16 = torch.bfloat16


def _constant(value: Any) -> Callable[..., Any]:
    def answer(*_arguments: Any) -> Any:
        return value

    answer._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return answer


def on(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    """Let CPU tensors through, as if they lay on a GPU of that compute capability."""
    monkeypatch.setattr(flash_attn, "_device_reason", _constant(None))
    monkeypatch.setattr(MACHINE, "capability", _constant((major, 0)))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake4:
    """The package alone, faked, on compute capability 9.0."""
    on(monkeypatch, 9)
    monkeypatch.setattr(MACHINE, "packages", {})
    made = Fake4()
    for module in ("flash_attn_interface", "fa3_fwd_interface"):
        monkeypatch.setitem(sys.modules, module, None)
    # What an installed flash-attn-4 leaves under FlashAttention 2's name.
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, MODULE, made.module())
    return made


def reason(case: AttentionCase) -> str | None:
    """Why the backend refuses a case that wants all gradients; None where it does not."""
    inputs = attention_inputs(case)
    leaves = {
        name: x.requires_grad_() if x.is_floating_point() and x.is_leaf else x
        for name, x in inputs.tensors.items()
    }
    request = prepare(inputs.function, **leaves, **inputs.options, backend="flash_attn")
    return flash_attn.unsupported_reason(request.call, MACHINE)


def check(case: AttentionCase) -> None:
    wrong = [str(row) for row in compare_case(case, backend="flash_attn") if not row.ok]
    assert not wrong, f"{case}: {wrong}"


@pytest.mark.parametrize("packed", [False, True], ids=["fixed", "packed"])
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_random_cases_stay_within_budget(fake: Fake4, packed: bool, data: st.DataObject) -> None:
    case = data.draw(attention_cases(BF16, packed, ("none",), most=2, epilogues=False))
    dims = data.draw(st.sampled_from(((8, 8), (16, 16), (64, 64), (24, 64), (16, 128))))
    scale = data.draw(st.sampled_from((None, 0.3)))
    case = dataclasses.replace(case, head_dim=dims[0], value_dim=dims[1], scale=scale, bias="none")
    assume(reason(case) is None)
    check(case)
    assert fake.backwards


@pytest.mark.parametrize("name", TABLE)
def test_edge_shapes_stay_within_budget_or_are_refused(fake: Fake4, name: str) -> None:
    case = dataclasses.replace(TABLE[name], dtype=BF16, bias="none", head_dim=16, value_dim=16)
    if reason(case) is None:
        check(case)
        assert fake.backwards
    else:
        assert name in ("no queries", "no keys", "no batch", "packed, no sequence")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", EPILOGUES)
def test_an_epilogue_is_a_pass_of_ours(fake: Fake4, name: str) -> None:
    check(dataclasses.replace(EPILOGUES[name], dtype=BF16, sinks=True, return_lse=True))
    assert fake.backwards


@pytest.mark.parametrize(
    ("window", "causal", "passed"),
    [
        ((-1, -1), False, (False, None, None)),
        ((-1, -1), True, (True, None, 0)),
        ((4, 0), False, (True, 4, 0)),
        ((4, 3), True, (True, 4, 0)),
        ((4, 3), False, (False, 4, 3)),
        ((99, 99), False, (False, None, None)),
        ((99, 3), False, (False, None, 3)),
        ((4, 99), False, (False, 4, None)),
    ],
)
def test_windows_are_mapped(
    fake: Fake4,
    window: tuple[int, int],
    causal: bool,
    passed: tuple[bool, int | None, int | None],
) -> None:
    q, k, v = (torch.randn(1, 20, 2, 8, dtype=BF16, requires_grad=True) for _ in range(3))
    out = value_residual_attention(q, k, v, window=window, causal=causal, backend="flash_attn")
    out.sum().backward()
    for call in (*fake.forwards, *fake.backwards):
        assert (call["causal"], call["window_size_left"], call["window_size_right"]) == passed
    assert len(fake.forwards) == len(fake.backwards) == 1


def test_every_argument_reaches_both_entry_points(fake: Fake4) -> None:
    q = torch.randn(7, 4, 16, dtype=BF16, requires_grad=True)
    k, v, v_first = (torch.randn(9, 2, 16, dtype=BF16, requires_grad=True) for _ in range(3))
    sinks = torch.randn(4, requires_grad=True)
    gate = torch.tensor(0.25, requires_grad=True)
    cu_q, cu_k = (torch.tensor([0, 3, n], dtype=torch.int32) for n in (7, 9))
    out, lse = value_residual_attention_varlen(
        *(q, k, v, v_first, gate, 0.5),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=5,
        max_seqlen_k=6,
        scale=0.3,
        softcap=7.0,
        sinks=sinks,
        return_lse=True,
        backend="flash_attn",
    )
    (out.float().sum() + lse.sum()).backward()
    mixed = (0.25 * v.float() + 0.5 * v_first.float()).to(BF16)
    (first,), (second,) = fake.forwards, fake.backwards
    for call in (first, second):
        assert all(torch.equal(call[n], x) for n, x in (("q", q), ("k", k), ("v", mixed)))
        assert torch.equal(call["learnable_sink"], sinks)
        assert torch.equal(call["cu_seqlens_q"], cu_q)
        assert torch.equal(call["cu_seqlens_k"], cu_k)
        assert (call["max_seqlen_q"], call["max_seqlen_k"]) == (5, 6)
        assert (call["softmax_scale"], call["softcap"]) == (0.3, 7.0)
    assert first["return_lse"]
    assert torch.equal(second["dlse"], torch.ones(4, 7))
    assert torch.equal(second["dout"], torch.ones(7, 4, 16, dtype=BF16))
    assert all(x.grad is not None for x in (q, k, v, v_first, sinks, gate))


def test_without_a_gradient_no_lse_is_asked_for(fake: Fake4) -> None:
    q = torch.randn(1, 5, 2, 8, dtype=BF16)
    value_residual_attention(q, q, q, backend="flash_attn")
    assert not fake.forwards[0]["return_lse"]


def test_nan_reaches_the_lse(fake: Fake4) -> None:
    q, k, v = torch.randn(3, 1, 6, 2, 8, dtype=BF16)
    q[0, 2, 1] = torch.nan
    out, lse = value_residual_attention(q, k, v, return_lse=True, backend="flash_attn")
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 2, 1]]
    assert lse.isnan().nonzero().tolist() == [[0, 1, 2]]
    assert fake.forwards


def test_backward_saves_no_mixed_value(fake: Fake4) -> None:
    q, k, v, v_first = (torch.randn(1, 6, 2, 8, dtype=BF16, requires_grad=True) for _ in range(4))
    held: set[int] = set()

    def keep(x: Tensor) -> Tensor:
        held.add(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = value_residual_attention(q, k, v, v_first, backend="flash_attn")
    assert fake.forwards[0]["v"].data_ptr() not in held
    assert {x.data_ptr() for x in (q, k, v, v_first, out)} <= held


def test_second_derivatives_raise(fake: Fake4) -> None:
    q, k, v = (torch.randn(1, 5, 2, 8, dtype=BF16, requires_grad=True) for _ in range(3))
    out = value_residual_attention(q, k, v, backend="flash_attn")
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        torch.autograd.grad(dq.sum(), q)
    assert fake.backwards


@pytest.mark.parametrize(
    ("major", "case", "refused"),
    [
        (9, {"head_dim": 12, "value_dim": 12}, "no kernels for head dimensions 12 and 12"),
        (9, {"head_dim": 64, "value_dim": 256}, "no kernels for head dimensions 64 and 256"),
        (9, {"head_dim": 128, "value_dim": 8}, "no kernels for head dimensions 128 and 8"),
        (9, {"head_dim": 264, "value_dim": 264}, "no kernels for head dimensions 264 and 264"),
        (9, {"head_dim": 64, "value_dim": 128}, "grouped heads needs values of q's head_dim"),
        (10, {"head_dim": 136, "value_dim": 136}, "no kernels for head dimensions 136 and 136"),
        (10, {"head_dim": 256, "value_dim": 256, "sinks": True}, "no window, sinks, softcap"),
        (10, {"head_dim": 256, "value_dim": 256, "softcap": 3.0}, "no window, sinks, softcap"),
        (10, {"head_dim": 256, "value_dim": 256, "window": (3, 0)}, "no window, sinks, softcap"),
        (10, {"head_dim": 256, "value_dim": 256, "return_lse": True}, "no window, sinks, softcap"),
        (8, {}, "compute capability 9 and 10 alone"),
        (12, {}, "compute capability 9 and 10 alone"),
        (9, {"bias": "mask"}, "attn_bias"),
        (9, {"scale": -0.5}, "no scale of 0 or less"),
        (9, {"dtype": torch.float32}, "bfloat16 and float16"),
    ],
)
def test_what_it_cannot_serve_has_a_reason_and_imports_nothing(
    fake: Fake4, monkeypatch: pytest.MonkeyPatch, major: int, case: dict[str, Any], refused: str
) -> None:
    on(monkeypatch, major)
    text = reason(AttentionCase(**{"dtype": BF16, **case}))
    assert text is not None
    assert refused in text
    assert four.FOUR.module not in MACHINE.packages
    assert not fake.forwards


@pytest.mark.parametrize(
    ("major", "case"),
    [
        (9, {"head_dim": 256, "value_dim": 256, "sinks": True, "softcap": 3.0}),
        (9, {"head_dim": 72, "value_dim": 72, "return_lse": True}),
        (9, {"head_dim": 192, "value_dim": 128, "kv_heads": 4}),
        (10, {"head_dim": 192, "value_dim": 128}),
        (10, {"head_dim": 256, "value_dim": 256, "causal": True}),
        (10, {"head_dim": 64, "value_dim": 64, "sinks": True, "window": (3, 1)}),
    ],
)
def test_what_it_serves(
    fake: Fake4, monkeypatch: pytest.MonkeyPatch, major: int, case: dict[str, Any]
) -> None:
    on(monkeypatch, major)
    asked = AttentionCase(**{"dtype": BF16, **case})
    assert reason(asked) is None
    check(asked)
    assert fake.backwards


@pytest.mark.parametrize("error", [ImportError, AttributeError, RuntimeError])
def test_a_broken_or_strange_package_is_refused(
    fake: Fake4, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    module: Any = fake.module()
    module._flash_attn_bwd = lambda q, k, v, out, dout, lse, softmax_scale=None: None  # noqa: ARG005
    monkeypatch.setitem(sys.modules, MODULE, module)
    case = AttentionCase(dtype=BF16)
    assert "its _flash_attn_bwd takes no causal, softcap" in str(reason(case))
    del module._flash_attn_bwd
    MACHINE.packages.clear()
    assert "it has no _flash_attn_bwd" in str(reason(case))

    class Broken:
        def find_spec(self, name: str, *_rest: Any) -> None:
            if name == "flash_attn":
                raise error("undefined symbol: cuLaunch")

    for name in ("flash_attn", MODULE):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    MACHINE.packages.clear()
    assert f"{MODULE}: it does not import: undefined symbol" in str(reason(case))


def test_alone_it_does_not_pass_for_version_2(fake: Fake4, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, 8)
    assert "flash_attn: it has no flash_attn_func" in str(reason(AttentionCase(dtype=BF16)))
    assert not fake.forwards


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_it_compiles_without_a_graph_break(fake: Fake4) -> None:
    compiled = torch.compile(value_residual_attention, fullgraph=True, backend="aot_eager")
    for length in (16, 24, 40):
        leaves = [torch.randn(1, length, 2, 8, dtype=BF16, requires_grad=True) for _ in range(4)]
        gate, sinks = torch.tensor(0.3, requires_grad=True), torch.randn(2, requires_grad=True)
        found = []
        for call, backend in ((compiled, "flash_attn"), (value_residual_attention, "reference")):
            options: dict[str, Any] = {"causal": True, "sinks": sinks, "return_lse": True}
            q, k, v, v_first = leaves
            out, lse = call(q, k, v, v_first, gate, 0.5, **options, backend=backend)
            wanted = [*leaves, gate, sinks]
            found.append(torch.autograd.grad(out.float().square().sum() + lse.sum(), wanted))
        torch.testing.assert_close(*found, atol=0.1, rtol=0.05)
    assert len(fake.backwards) == 3


@pytest.mark.usefixtures("interpreter")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_epilogue_compiles_without_a_graph_break(fake: Fake4) -> None:
    compiled = torch.compile(value_residual_attention, fullgraph=True, backend="aot_eager")
    for length in (16, 24):
        leaves = [torch.randn(1, length, 2, 8, dtype=BF16, requires_grad=True) for _ in range(4)]
        part = torch.randn(1, length, 2, 1, requires_grad=True)
        found = []
        for call, backend in ((compiled, "flash_attn"), (value_residual_attention, "reference")):
            # One tensor in two places, and a number.
            for exclusive, gate in ((part, part), (0.5, None)):
                options: dict[str, Any] = {"exclusive": exclusive, "out_gate": gate}
                out = call(*leaves, causal=True, **options, backend=backend)
                wanted = leaves if gate is None else [*leaves, part]
                found.append(torch.autograd.grad(out.float().square().sum(), wanted))
        torch.testing.assert_close(found[:2], found[2:], atol=0.1, rtol=0.05)
    assert fake.backwards


def test_the_ops_pass_opcheck(fake: Fake4) -> None:
    inputs = attention_inputs(
        AttentionCase(dtype=BF16, q_len=5, k_len=7, lambda_v="scalar", sinks=True, return_lse=True)
    )
    request = prepare(inputs.function, **inputs.tensors, **inputs.options, backend="flash_attn")
    assert flash_attn.unsupported_reason(request.call, MACHINE) is None
    opened = getattr(torch.ops, four.NAMESPACE).value_residual_attention_forward.default
    torch.library.opcheck(opened, tuple(request.call), test_utils="test_schema")
    torch.library.opcheck(opened, tuple(request.call), test_utils="test_faketensor")
    assert fake.forwards

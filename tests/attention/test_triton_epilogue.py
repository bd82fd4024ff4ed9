"""What follows the softmax in the Triton kernels: edges, bits, and what is compiled for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import value_residual_attention
from resformer_kernels._core.op import NATIVE, TRITON
from resformer_kernels._core.select import prepare
from resformer_kernels.attention import epilogue_op
from resformer_kernels.attention.epilogue import keeping
from resformer_kernels.attention.op import BackwardCall
from resformer_kernels.attention.record import LEAVES
from resformer_kernels.testing import AttentionCase, attention_inputs, compare_case
from tests.attention.epilogues import EPILOGUES
from tests.attention.variants import Variant

pytestmark = pytest.mark.usefixtures("interpreter")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("mix", ["inline", "prologue"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_gradients_stay_within_budget(dtype: torch.dtype, mix: str, name: str) -> None:
    if mix == "inline" and dtype is torch.float16:
        pytest.skip("as bfloat16")
    case = dataclasses.replace(EPILOGUES[name], dtype=dtype, sinks=True, return_lse=True)
    with Variant(32, 32, mix=mix).in_force():
        wrong = [str(row) for row in compare_case(case, backend="triton") if not row.ok]
    assert not wrong


@pytest.mark.parametrize("group", [1, 3, 8])
def test_grouped_heads_sum_onto_their_value(group: int) -> None:
    case = AttentionCase(
        heads=2 * group, causal=True, exclusive="token_head", out_gate="head", q_len=19, k_len=30
    )
    wrong = [str(row) for row in compare_case(case, backend="triton") if not row.ok]
    assert not wrong


def test_a_query_without_a_key_of_its_own_excludes_nothing() -> None:
    q = torch.randn(1, 40, 2, 16)
    k, v = torch.randn(2, 1, 21, 2, 16)
    plain = value_residual_attention(q, k, v, backend="triton")
    out = value_residual_attention(q, k, v, exclusive=1.0, backend="triton")
    assert torch.equal(out[:, :19], plain[:, :19])
    own = v / v.norm(dim=-1, keepdim=True)
    assert (out[:, 19:] * own).sum(-1).abs().max() < 1e-5
    assert (plain[:, 19:] * own).sum(-1).abs().max() > 1e-2


def test_a_zero_value_excludes_nothing() -> None:
    q, k, v = (torch.randn(1, 20, 2, 16) for _ in range(3))
    v[:, ::3] = 0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    plain = value_residual_attention(*leaves, backend="triton")
    out = value_residual_attention(*leaves, exclusive=1.0, backend="triton")
    assert torch.equal(out[:, ::3], plain[:, ::3])
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), leaves))


def test_a_value_that_no_query_stands_at_has_no_part() -> None:
    value = torch.randn(1, 12, 1, 16)
    value[:, :8] = torch.nan
    rows = torch.randn(1, 4, 1, 16)
    given = epilogue_op.EpilogueCall(rows, value, None, None, 4, 12, None, 0.5, 1e-6, None)
    dy, dvalue, _, _ = epilogue_op.BACKWARD(
        TRITON, epilogue_op.EpilogueBackwardCall(rows, given, 0b11)
    )
    assert dy.isfinite().all()
    assert dvalue.isfinite().all()
    assert not dvalue[:, :8].any()
    assert dvalue[:, 8:].all()


def _launches(changes: dict[str, Any], **case: Any) -> list[Any]:
    """What forward and backward launch, on meta tensors."""
    from resformer_kernels._triton.launch import assumed_capability, recorded_launches
    from resformer_kernels.attention.triton.backward import backward
    from resformer_kernels.attention.triton.forward import forward

    inputs = attention_inputs(AttentionCase(**{"dtype": torch.bfloat16, **case}), "cpu")
    call = prepare(inputs.function, **inputs.tensors, **inputs.options).call
    call = keeping(call._replace(**changes))
    moved = {n: x.to("meta") for n, x in call._asdict().items() if isinstance(x, Tensor)}
    call = call._replace(**moved, return_lse=True, return_ungated=call.out_gate is not None)
    with assumed_capability((9, 0)), recorded_launches() as launches:
        out, lse, _, along, _ = forward(call, inline=True)
        kept = along if call.return_along else None
        backward(BackwardCall(out, None, None, call, out, lse, kept, 2 ** len(LEAVES) - 1))
    return launches


def _compiled(launches: list[Any]) -> set[Any]:
    """What tells compiled kernels apart: `specialise.identity`, for kernels of the interpreter."""
    from resformer_kernels._triton import specialise

    return {
        (x.kernel.__name__, *((n, specialise._form(value, "")) for n, value in x.kwargs.items()))
        for x in launches
    }


def test_one_kernel_serves_every_tensor_form() -> None:
    forms = ("scalar", "head", "token", "token_head")
    found = [_compiled(_launches({}, exclusive=form, out_gate="token_head")) for form in forms]
    assert all(kernels == found[0] for kernels in found)
    found = [
        _compiled(_launches({}, exclusive="head", out_gate=form)) for form in ("head", "token_head")
    ]
    assert found[0] == found[1]
    # A number, and a gate for each channel, are kernels of their own.
    assert _compiled(_launches({}, exclusive="one", out_gate="head")) != found[0]
    assert _compiled(_launches({}, exclusive="head", out_gate="full")) != found[0]


def test_a_plain_call_launches_and_compiles_nothing_for_it() -> None:
    plain = _launches({})
    assert "epilogue_backward_kernel" not in [x.kernel.__name__ for x in plain]
    (forward,) = [x for x in plain if x.kernel.__name__ == "forward_kernel"]
    assert forward.kwargs["epilogue"] is None
    assert _compiled(plain) == _compiled(_launches({"exclusive_eps": 0.5}))
    assert _compiled(plain) != _compiled(_launches({}, exclusive="one"))


@pytest.mark.parametrize("namespace", [NATIVE, TRITON])
@pytest.mark.parametrize("name", ["scalar, per head", "gate", "packed"])
def test_the_epilogue_alone_passes_opcheck(namespace: str, name: str) -> None:
    given, mask = _alone(name)
    ops = getattr(torch.ops, namespace)
    torch.library.opcheck(ops.attention_epilogue_forward.default, tuple(given))
    back = epilogue_op.EpilogueBackwardCall(torch.randn_like(given.y), given, mask)
    flat = epilogue_op.BACKWARD.flatten(back)
    torch.library.opcheck(ops.attention_epilogue_backward.default, flat)


@pytest.mark.parametrize("name", EPILOGUES)
def test_the_epilogue_alone_is_the_formula(name: str) -> None:
    given, mask = _alone(name)
    back = epilogue_op.EpilogueBackwardCall(torch.randn_like(given.y), given, mask)
    for op, call in ((epilogue_op.FORWARD, given), (epilogue_op.BACKWARD, back)):
        got, expected = (op(namespace, call) for namespace in (TRITON, NATIVE))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def _alone(name: str) -> tuple[epilogue_op.EpilogueCall, int]:
    """A call of the op in float32, zeros in place of NaN, and a mask of all gradients."""
    inputs = attention_inputs(EPILOGUES[name])
    call = prepare(inputs.function, **inputs.tensors, **inputs.options).call
    y = torch.randn(*call.q.shape[:-1], call.value.shape[-1])
    given = epilogue_op.epilogue_of(call, y, call.value.nan_to_num())
    return given, sum(
        1 << i for i, x in enumerate(epilogue_op.LEAVES) if getattr(given, x) is not None
    )

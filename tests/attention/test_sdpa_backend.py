"""The backend of torch's own attention, held to float64 like every other."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resformer_kernels import value_residual_attention
from resformer_kernels._core.select import prepare
from resformer_kernels.attention import sdpa
from resformer_kernels.testing import AttentionCase, compare_case
from tests.attention.cases import TABLE, attention_cases

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
SERVED: dict[str, Any] = {"softcap": 0.0, "sinks": False, "return_lse": False}
ALLOWED = dict.fromkeys(("dv", "dv_first", "dlambda_v", "dlambda_first"), 2.0)
"""Times the budget in float32, at most: torch's backward multiplies q and k in other blocks than
its forward, so that exp(S - LSE) has the rounding of two S. 1.8 is the most in 900 random cases."""
EDGES = [
    name
    for name, case in TABLE.items()
    if case.lengths is None and "window in segments" not in name and name != "several tiles"
]
"""Those of forms; what is long has a test of its own."""


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(case: AttentionCase) -> None:
    wrong = [
        str(row)
        for row in compare_case(case, backend="sdpa")
        if row.error > row.budget * (ALLOWED.get(row.name, 1) if case.dtype is DTYPES[0] else 1)
    ]
    assert not wrong, f"{case}: {wrong}"


@by_dtype
@pytest.mark.parametrize("square", [False, True], ids=["any", "square"])
@settings(max_examples=16)
@given(data=st.data())
def test_random_cases_stay_within_budget(
    dtype: torch.dtype, square: bool, data: st.DataObject
) -> None:
    case = dataclasses.replace(data.draw(attention_cases(dtype, packed=False)), **SERVED)
    if square:  # torch's own causal order, and no padding
        case = dataclasses.replace(case, k_len=case.q_len, value_dim=case.head_dim)
    check(case)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", EDGES)
def test_edge_shapes_stay_within_budget(dtype: torch.dtype, name: str) -> None:
    check(dataclasses.replace(TABLE[name], dtype=dtype, **SERVED))


@by_dtype
@pytest.mark.parametrize("causal", [False, True])
def test_long_causal_and_wide_heads(dtype: torch.dtype, causal: bool) -> None:
    long = AttentionCase(
        batch=1, q_len=800, k_len=800, heads=2, kv_heads=1, dtype=dtype, causal=causal
    )
    check(long)
    check(dataclasses.replace(long, q_len=70, k_len=70, head_dim=512, value_dim=512, scale=-0.05))


@by_dtype
def test_the_lse_is_that_of_the_contract(dtype: torch.dtype) -> None:
    q, k = rand(2, 9, 6, 16, dtype=dtype), rand(2, 7, 3, 16, dtype=dtype)
    mask = torch.ones(2, 1, 9, 7, dtype=torch.bool).tril(1)
    mask[0, :, 3] = False
    for options in ({"causal": True}, {"attn_bias": mask, "scale": -0.3}, {"window": (2, 1)}):
        out, lse = value_residual_attention(q, k, k, return_lse=True, backend="sdpa", **options)
        wide = value_residual_attention(
            *(x.double() for x in (q, k, k)), return_lse=True, **options
        )
        assert lse.dtype == torch.float32
        torch.testing.assert_close(lse, wide[1].float(), rtol=2e-5, atol=2e-5)
        empty = (lse == -torch.inf).transpose(1, 2)
        assert out[empty].eq(0).all()
        assert "causal" in options or "window" in options or int(empty.sum()) == 6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_infinity_propagate_as_in_the_reference(where: str, bad: float) -> None:
    tensors = {"q": rand(1, 40, 4, 16), "k": rand(1, 40, 2, 16), "v": rand(1, 41, 2, 16)[:, 1:]}
    tensors[where][0, 7, 1, 3] = bad
    got, expected = (
        value_residual_attention(**tensors, backend=x)  # type: ignore[arg-type]
        for x in ("sdpa", "reference")
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("magnitude", [1e-30, 1e4, 1e18])
@pytest.mark.parametrize("scale", [0.25, -0.25])
def test_extreme_magnitudes(magnitude: float, scale: float) -> None:
    q, k, v = rand(2, 9, 4, 16) * magnitude, rand(2, 9, 2, 16), rand(2, 9, 2, 17)[..., 1:]
    for causal in (False, True):
        given: dict[str, Any] = {"scale": scale, "causal": causal}
        out = value_residual_attention(q, k, v, **given, backend="sdpa")
        wide = value_residual_attention(*(x.double() for x in (q, k, v)), **given)
        torch.testing.assert_close(out, wide.float(), rtol=1e-4, atol=1e-4)


@by_dtype
def test_the_most_negative_number_is_a_number(dtype: torch.dtype) -> None:
    q, k, v = (rand(1, 5, 2, 8 + i, dtype=dtype)[..., i:] for i in range(3))
    for bias_dtype in {torch.float32, dtype}:
        bias = torch.full((1, 1, 5, 5), torch.finfo(bias_dtype).min, dtype=bias_dtype)
        bias[..., 4] = -torch.inf
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = value_residual_attention(*leaves, attn_bias=bias, scale=0.0, backend="sdpa")
        mean = v[:, :4].float().mean(1, keepdim=True).expand(out.shape)
        torch.testing.assert_close(
            out.float(), mean, rtol=0, atol=float(bias_dtype.itemsize < 3) / 64 + 1e-2
        )
        out.float().sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


def test_a_bias_keeps_its_precision() -> None:
    """A float32 bias beside bfloat16 operands is not rounded to them."""
    q, k = torch.zeros(1, 1, 1, 8).bfloat16(), torch.zeros(1, 2, 1, 8).bfloat16()
    bias = torch.tensor([100.0, 100.25])
    _, lse = value_residual_attention(q, k, k, attn_bias=bias, return_lse=True, backend="sdpa")
    torch.testing.assert_close(lse.flatten(), torch.logsumexp(bias, 0, keepdim=True))


@pytest.mark.parametrize("square", [False, True])
@by_dtype
def test_forward_again_gives_what_the_kernels_do(dtype: torch.dtype, square: bool) -> None:
    """The way of other devices, which a CPU has too."""
    q, k, v = (
        rand(2, n, h, 16, dtype=dtype) for n, h in ((20, 6), *((20 if square else 33, 2),) * 2)
    )
    for options in (
        {},
        {"causal": True},
        {"window": (3, 2)},
        {"attn_bias": torch.arange(20)[:, None] > 5},
    ):
        call = prepare(value_residual_attention, q, k, v, **options).call
        y, lse = sdpa._attend(call, v)
        torch.testing.assert_close(sdpa._by_torch(call, v, sdpa._mask(call)), y)
        grad = rand(*y.shape, dtype=dtype)
        direct = sdpa._directly(call, v, y, lse, grad)
        for a, b in zip(sdpa._again(call, v, grad, False), direct, strict=True):
            loose = 1e-5 if dtype is torch.float32 else 2e-2
            torch.testing.assert_close(a, b, rtol=loose, atol=loose)
            assert a.is_contiguous()
            assert b.is_contiguous()

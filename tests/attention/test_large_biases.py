"""Additive biases of any finite size: a row masked whole with one is a softmax like any other.

Only -inf empties a row. The most negative finite number gives the mean of the values, as in torch,
and an LSE in which float32 has no room for the log of the sum must not spoil the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import value_residual_attention, value_residual_attention_varlen

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
INF = float("inf")
HEADS, KV_HEADS, DIM = 4, 2, 16
# Queries and keys: more than two of the native kernels' tiles, and of the configured Triton ones.
LENGTHS = {"native": (150, 420), "triton": (8, 140), "reference": (8, 140)}


def whole(bias: Tensor, least: float) -> None:
    bias[:, :, 2] = least


def among_minus_inf(bias: Tensor, least: float) -> None:
    bias[:, :, 2] = -INF
    bias[:, :, 2, 1::3] = least
    bias[:, :, 3] = -INF


def first_tiles(bias: Tensor, least: float) -> None:
    bias[:, :, 2, :-5] = least


def last_tiles(bias: Tensor, least: float) -> None:
    bias[:, :, 2, 5:] = least


def alternating(bias: Tensor, least: float) -> None:
    bias[:, :, 2] = least
    bias[:, :, 2, ::2] = least * 0.996  # larger, and as far beyond the range of log2 units
    bias[:, :, 3] = least / 2


def largest(bias: Tensor, least: float) -> None:
    bias[:, :, 2] = -least
    bias[:, :, 3, 7:9] = -least
    bias[:, :, 3, 9:] = least


def padding(bias: Tensor, least: float) -> None:
    bias[:, :, :, 4:] = least
    bias[:, 1:] = least


FORMS: dict[str, tuple[Callable[[Tensor, float], None], tuple[bool, bool, bool]]] = {
    # What fills it, and whether it has heads, queries and keys of its own.
    "whole": (whole, (False, True, True)),
    "among -inf": (among_minus_inf, (True, True, True)),
    "first tiles": (first_tiles, (False, True, True)),
    "last tiles": (last_tiles, (False, True, True)),
    "alternating": (alternating, (True, True, True)),
    "largest": (largest, (False, True, True)),
    "padding": (padding, (True, False, True)),
    "whole, one column": (whole, (False, True, False)),
}


def draw(dtype: torch.dtype, queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((queries, HEADS), (keys, KV_HEADS), (keys, KV_HEADS), (keys, KV_HEADS))
    return [torch.randn(1, *rows, DIM, generator=generator).to(dtype) for rows in shapes]


def results(
    inputs: list[Tensor], bias: Tensor, backend: str, sinks: Tensor | None = None, **options: Any
) -> list[Tensor]:
    """out, LSE and every gradient."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, bias)]
    if sinks is not None:
        leaves.append(sinks.detach().requires_grad_())
        options["sinks"] = leaves[-1]
    q, k, v, v_first, given = leaves[:5]
    out, lse = value_residual_attention(
        q, k, v, v_first, 0.7, 0.4, attn_bias=given, return_lse=True, backend=backend, **options
    )
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(x.shape, generator=generator) for x in (out, lse)]
    kept = lse.masked_fill(lse == -INF, 0)
    loss = (out.float() * weights[0]).sum() + (kept * weights[1]).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def assert_near(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    names = ("out", "lse", "q", "k", "v", "v_first", "attn_bias", "sinks")
    for name, one, other in zip(names, found, expected, strict=False):
        if name == "lse":
            torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            continue
        largest = float(other.float().abs().max())
        error = float((one.float() - other.float()).abs().max())
        assert error <= TOLERANCE[dtype] * largest, (name, error, largest)


def compare(dtype: torch.dtype, bias: Tensor, backend: str, **options: Any) -> list[Tensor]:
    """Hold a backend against the reference on the same numbers in float32; its results."""
    inputs = draw(dtype, *LENGTHS[backend])
    found = results(inputs, bias, backend, **options)
    wide = [x.float() for x in inputs]
    assert_near(found, results(wide, bias.float(), "reference", **options), dtype)
    return found


def made(form: str, dtype: torch.dtype, backend: str, least: float | None = None) -> Tensor:
    fill, (heads, *own) = FORMS[form]
    sizes = (size if there else 1 for size, there in zip(LENGTHS[backend], own, strict=True))
    bias = torch.zeros(1, HEADS if heads else 1, *sizes, dtype=dtype)
    fill(bias, torch.finfo(dtype).min if least is None else least)
    return bias


@by_dtype
@pytest.mark.parametrize("form", FORMS)
def test_most_negative_numbers(form: str, dtype: torch.dtype, backend: str) -> None:
    compare(dtype, made(form, torch.float32, backend), backend)


@by_dtype
def test_those_of_16_bits(dtype: torch.dtype, backend: str) -> None:
    compare(dtype, made("alternating", dtype, backend), backend)


@by_dtype
@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("form", FORMS)
def test_every_cpu_path(form: str, dtype: torch.dtype) -> None:
    compare(dtype, made(form, dtype, "native"), "native")


@by_dtype
@pytest.mark.parametrize("least", [-1e9, -1e5, -1e4, 1e4])
def test_other_large_numbers(least: float, dtype: torch.dtype, kernels: str) -> None:
    compare(dtype, made("whole", torch.float32, kernels, least), kernels)


@by_dtype
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0},
        {"causal": True},
        {"window": (40, 3)},
        {"scale": -0.0},
        {"sinks": torch.tensor([0.0, 3.0, -INF, -2.0])},
        {"sinks": torch.full((HEADS,), torch.finfo(torch.float32).min)},
        {"sinks": torch.full((HEADS,), 5000.0)},
    ],
    ids=["softcap", "causal", "window", "no scores", "sinks", "least", "large"],
)
def test_with_other_options(options: dict[str, Any], dtype: torch.dtype, kernels: str) -> None:
    compare(dtype, made("among -inf", torch.float32, kernels), kernels, **options)


@by_dtype
def test_scores_that_are_large_too(dtype: torch.dtype, kernels: str) -> None:
    """A sum beyond float32 is -inf or inf, as torch's is; gradients would be beyond 16 bits."""
    bias = made("whole", torch.float32, kernels)
    inputs = draw(dtype, *LENGTHS[kernels])
    found = results(inputs, bias, kernels, scale=3e36)[:2]
    wide = [x.float() for x in inputs]
    assert_near(found, results(wide, bias, "reference", scale=3e36)[:2], dtype)


@by_dtype
def test_what_it_is(dtype: torch.dtype, backend: str) -> None:
    bias = made("among -inf", torch.float32, backend)
    out, lse, *_ = results(draw(dtype, *LENGTHS[backend]), bias, backend)
    _, _, v, v_first = (x.float() for x in draw(dtype, *LENGTHS[backend]))
    mean = (0.7 * v + 0.4 * v_first)[:, 1::3].mean(1).repeat_interleave(HEADS // KV_HEADS, 1)
    torch.testing.assert_close(out[:, 2].float(), mean, rtol=0, atol=TOLERANCE[dtype])
    assert (lse[..., 2] == torch.finfo(torch.float32).min).all()
    assert not out[:, 3].any()
    assert (lse[..., 3] == -INF).all()


@by_dtype
@pytest.mark.usefixtures("interpreter")
def test_packed(dtype: torch.dtype) -> None:
    q, k, v, _ = (x[0] for x in draw(dtype, 20, 90))
    bias = torch.zeros(2, 1, 10, 50, dtype=dtype)
    bias[0, :, 3] = bias[1, :, :, 7:] = torch.finfo(dtype).min
    offsets = [torch.tensor(x, dtype=torch.int32) for x in ([0, 10, 18], [0, 50, 90])]

    def run(tensors: list[Tensor], backend: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        q, k, v, bias = leaves
        out, lse = value_residual_attention_varlen(
            q, k, v, cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], max_seqlen_q=10,
            max_seqlen_k=50, attn_bias=bias, return_lse=True, backend=backend,
        )  # fmt: skip
        gradients = torch.autograd.grad(out.float().pow(2).sum(), leaves)
        # The gradient of a second source of values, which is absent here.
        return [out.detach(), lse.detach(), *gradients[:3], gradients[2], gradients[3]]

    found = run([q, k, v, bias], "triton")
    assert_near(found, run([x.float() for x in (q, k, v, bias)], "reference"), dtype)


@by_dtype
def test_sinks_lower_than_log2_units_reach(dtype: torch.dtype, backend: str) -> None:
    q, k, v, _ = draw(dtype, 6, 8)
    least = torch.finfo(torch.float32).min
    sinks = torch.full((HEADS,), least).requires_grad_()
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[2] = False
    q.requires_grad_()
    out, lse = value_residual_attention(
        q, k, v, attn_bias=mask, sinks=sinks, return_lse=True, backend=backend
    )
    assert not out[:, 2].any()
    assert (lse[..., 2] == least).all()
    dq, dsinks = torch.autograd.grad(out.float().sum() + (lse[..., 2] * 0.5).sum(), (q, sinks))
    assert dq.isfinite().all()
    torch.testing.assert_close(dsinks, torch.full((HEADS,), 0.5))

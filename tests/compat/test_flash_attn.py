"""The drop-ins for FlashAttention 2, against what its documentation says, in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import explain
from resformer_kernels.compat import flash_attn
from resformer_kernels.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from tests.compat.documented import ADDED, close, documented, offsets, rand

_TAIL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


@pytest.mark.parametrize(
    ("function", "leading", "trailing"),
    [
        (flash_attn_func, ("q", "k", "v"), ()),
        (flash_attn_kvpacked_func, ("q", "kv"), ()),
        (flash_attn_qkvpacked_func, ("qkv",), ()),
        (flash_attn_varlen_func, ("q", "k", "v", *_LENGTHS), ("block_table",)),
        (flash_attn_varlen_kvpacked_func, ("q", "kv", *_LENGTHS), ()),
        (flash_attn_varlen_qkvpacked_func, ("qkv", "cu_seqlens", "max_seqlen"), ()),
    ],
)
def test_signatures(
    function: Callable[..., Any], leading: tuple[str, ...], trailing: tuple[str, ...]
) -> None:
    parameters = list(inspect.signature(function).parameters.values())
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(positional) == [*leading, *_TAIL, *trailing]
    assert {name: positional[name] for name in _TAIL} == _TAIL
    added = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert added == ADDED
    assert function.__name__ in flash_attn.__all__


@pytest.mark.parametrize(("tq", "tk"), [(5, 5), (2, 5), (5, 2), (1, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"causal": True, "window_size": (2, 3)},
        {"window_size": (1, 1), "softmax_scale": -0.4},
        {"softcap": 0.5, "softmax_scale": 2.0},
    ],
)
def test_meaning(tq: int, tk: int, options: dict[str, Any]) -> None:
    q, k, v = rand(2, tq, 4, 8), rand(2, tk, 2, 8), rand(2, tk, 2, 6)
    first = v.cos()
    out, lse, dropped = flash_attn_func(
        q, k, v, **options, v_first=first, lambda_v=0.3, lambda_first=-2, return_attn_probs=True
    )
    assert dropped.shape == (0,)
    for b in range(2):
        expected_out, expected_lse = documented(q[b], k[b], 0.3 * v[b] - 2 * first[b], **options)
        close(out[b], expected_out)
        close(lse[b], expected_lse)
    without = flash_attn_func(q, k, 0.3 * v - 2 * first, **options)
    close(without, out)


def test_positions_of_the_arguments() -> None:
    """A call as FlashAttention's users write it, by position."""
    q, k, v = rand(2, 5, 4, 8), rand(2, 5, 2, 8), rand(2, 5, 2, 8)
    out, lse, _ = flash_attn_func(q, k, v, 0.0, 0.3, True, (2, 0), 0.0, None, True, True)
    expected_out, expected_lse = documented(q[1], k[1], v[1], 0.3, True, (2, 0))
    close(out[1], expected_out)
    close(lse[1], expected_lse)


def test_packed_sequences() -> None:
    q, k, v, first = rand(9, 4, 8), rand(12, 2, 8), rand(12, 2, 8), rand(12, 2, 8).sin()
    cu_q, cu_k = offsets(2, 0, 7), offsets(5, 3, 4)
    gate = rand(12, 2, 1)
    out, lse, dropped = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 7, 5, 0.0, None, True, return_attn_probs=True,
        v_first=first, lambda_v=1.0, lambda_first=gate,
    )  # fmt: skip
    assert lse.shape == (4, 9)
    assert dropped.shape == (0,)
    for b in range(3):
        rows, keys = slice(*cu_q[b : b + 2].tolist()), slice(*cu_k[b : b + 2].tolist())
        mixed = v[keys] + gate[keys] * first[keys]
        expected_out, expected_lse = documented(q[rows], k[keys], mixed, causal=True)
        close(out[rows], expected_out)
        close(lse[:, rows], expected_lse)


def test_stacked_tensors_are_the_separate_ones(backend: str) -> None:
    options: dict[str, Any] = {"causal": True, "window_size": (3, 0), "softcap": 4.0}
    ours: dict[str, Any] = {"lambda_v": 0.2, "lambda_first": 0.9, "backend": backend}
    qkv = rand(2, 6, 3, 4, 8, dtype=torch.float32).requires_grad_()
    first = rand(2, 6, 4, 8, dtype=torch.float32)
    q, k, v = qkv.unbind(2)
    cu = offsets(6, 6)

    def grads(out: Tensor) -> list[Tensor]:
        return [out, *torch.autograd.grad(out.square().sum(), qkv)]

    expected = grads(flash_attn_func(q, k, v, **options, v_first=first, **ours))
    kv = qkv[:, :, 1:]
    found = [
        flash_attn_qkvpacked_func(qkv, **options, v_first=first, **ours),
        flash_attn_kvpacked_func(q, kv, **options, v_first=first, **ours),
    ]
    options |= {"v_first": first.flatten(0, 1)} | ours
    flat_q, flat_kv = q.flatten(0, 1), kv.flatten(0, 1)
    found += [
        flash_attn_varlen_qkvpacked_func(qkv.flatten(0, 1), cu, 6, **options).view(2, 6, 4, 8),
        flash_attn_varlen_kvpacked_func(flat_q, flat_kv, cu, cu, 6, 6, **options).view(2, 6, 4, 8),
    ]
    for out in found:
        torch.testing.assert_close(grads(out), expected, rtol=1e-5, atol=1e-5)


def test_the_lse_has_a_gradient(backend: str) -> None:
    q, k, v = (rand(1, 5, 2, 8, dtype=torch.float32).add(i).requires_grad_() for i in range(3))
    _, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, backend=backend)
    (dk,) = torch.autograd.grad(lse.sum(), k)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(8)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(dk, torch.autograd.grad(scores.logsumexp(-1).sum(), k)[0])


def test_first_values_alone() -> None:
    q, k, first = rand(2, 5, 4, 8), rand(2, 5, 2, 8), rand(2, 5, 2, 8)
    close(flash_attn_func(q, k, None, v_first=first), flash_attn_func(q, k, first))


def test_explain_understands_them(native: str) -> None:
    qkv = rand(2, 6, 3, 4, 8, dtype=torch.float32)
    q, k, v = qkv.unbind(2)
    cu, flat = offsets(6, 6), qkv.flatten(0, 1)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (flash_attn_func, (q, k, v, 0.0, None, True)),
        (flash_attn_qkvpacked_func, (qkv,)),
        (flash_attn_kvpacked_func, (q, qkv[:, :, 1:])),
        (flash_attn_varlen_func, (*flat.unbind(1), cu, cu, 6, 6)),
        (flash_attn_varlen_qkvpacked_func, (flat, cu, 6)),
        (flash_attn_varlen_kvpacked_func, (flat[:, 0], flat[:, 1:], cu, cu, 6, 6)),
    ]
    for function, arguments in calls:
        found = explain(function, *arguments, v_first=None, lambda_v=0.5)
        assert found.backend == native
        assert not found.notes  # nothing is copied


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dropout": ({"dropout_p": 0.1}, NotImplementedError, "dropout_p must be 0, got 0.1"),
    "no probability": ({"dropout_p": -1.0}, ValueError, "dropout_p must be a probability"),
    "ALiBi": ({"alibi_slopes": torch.ones(4)}, NotImplementedError, "alibi_slopes must be None"),
    "window": ({"window_size": (-2, 0)}, ValueError, "window_size takes sizes"),
    "window's type": ({"window_size": 4}, TypeError, "window_size must be a pair"),
    "scale": ({"softmax_scale": float("inf")}, ValueError, "softmax_scale must be finite"),
    "scale's type": ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a number"),
    "softcap": ({"softcap": -1.0}, ValueError, "softcap must be"),
    "causal": ({"causal": None}, TypeError, "causal must be True or False"),
    "deterministic": ({"deterministic": 2}, TypeError, "deterministic must be True or False"),
    "return_attn_probs": ({"return_attn_probs": 1}, TypeError, "return_attn_probs must be"),
    "q": ({"q": None}, TypeError, "q must be a tensor"),
    "no head_dim": ({"q": torch.ones(2, 5, 4, 0)}, ValueError, "k must have q's head_dim 0"),
    "coefficient": (
        {"v_first": torch.ones(2, 5, 2, 8), "lambda_v": torch.ones(2)},
        ValueError,
        r"lambda_v .* one coefficient per KV head has shape \(2, 1\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    changed, error, message = BAD[name]
    arguments: dict[str, Any] = {
        "q": torch.ones(2, 5, 4, 8), "k": torch.ones(2, 5, 2, 8), "v": torch.ones(2, 5, 2, 8)
    }  # fmt: skip
    with pytest.raises(error, match=message):
        flash_attn_func(**{**arguments, **changed})


def test_bad_stacked_and_paged_input_is_named() -> None:
    q, cu = torch.ones(6, 4, 8), offsets(6)
    with pytest.raises(ValueError, match=r"qkv must be \(B, T, 3, heads, head_dim\), got shape"):
        flash_attn_qkvpacked_func(torch.ones(2, 5, 2, 4, 8))
    with pytest.raises(ValueError, match=r"kv must be \(total_tokens, 2, heads, head_dim\), got"):
        flash_attn_varlen_kvpacked_func(q, torch.ones(6, 3, 4, 8), cu, cu, 6, 6)
    with pytest.raises(TypeError, match="qkv must be a tensor"):
        flash_attn_varlen_qkvpacked_func([q], cu, 6)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cu_seqlens must end within q's 6 tokens, got 7"):
        flash_attn_varlen_qkvpacked_func(torch.ones(6, 3, 4, 8), offsets(7), 7)
    with pytest.raises(TypeError, match="cu_seqlens_q must be int32"):
        flash_attn_varlen_func(q, q, q, cu.long(), cu, 6, 6)

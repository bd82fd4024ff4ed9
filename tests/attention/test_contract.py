"""The contract of value_residual_attention, point by point, on every backend that runs here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import explain, value_residual_attention, value_residual_attention_varlen
from resformer_kernels.testing import AttentionCase, attention_inputs

H, HKV, D = 4, 2, 16


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(
    batch: int = 2, q_len: int = 9, k_len: int = 9, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        rand(batch, q_len, H, D, dtype=dtype, seed=1),
        rand(batch, k_len, HKV, D, dtype=dtype, seed=2),
        rand(batch, k_len, HKV, D, dtype=dtype, seed=3),
        rand(batch, k_len, HKV, D, dtype=dtype, seed=4),
    )


def near(a: Tensor, b: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_sinks_are_raw_logits(backend: str) -> None:
    q, k, v, _ = qkv()
    sinks = rand(H)
    options: dict[str, Any] = {"scale": 3.0, "softcap": 2.0, "backend": backend}
    out, lse = value_residual_attention(q, k, v, return_lse=True, **options)
    sunk, sunk_lse = value_residual_attention(q, k, v, sinks=sinks, return_lse=True, **options)
    near(sunk_lse, torch.logaddexp(lse, sinks[:, None]))
    near(sunk, out * torch.exp(lse - sunk_lse).transpose(1, 2)[..., None])


def test_softcap_comes_before_bias(backend: str) -> None:
    q, k, v, _ = qkv(1, 2, 2)
    bias = torch.tensor([0.0, 50.0])
    out = value_residual_attention(q, k, v, softcap=1.0, attn_bias=bias, backend=backend)
    near(out, v[:, 1:].repeat_interleave(2, dim=2).expand_as(out))


def test_masks_align_bottom_right(backend: str) -> None:
    q, k, v, _ = qkv(1, 3, 5)
    out = value_residual_attention(q, k, v, causal=True, backend=backend)
    first = value_residual_attention(q[:, :1], k[:, :3], v[:, :3], backend=backend)
    near(out[:, :1], first)
    near(
        value_residual_attention(q, k, v, window=(0, 0), backend=backend),
        v[:, 2:].repeat_interleave(2, dim=2),
    )


def test_causal_closes_the_right_of_the_window(backend: str) -> None:
    q, k, v, _ = qkv()
    assert torch.equal(
        value_residual_attention(q, k, v, causal=True, window=(2, 5), backend=backend),
        value_residual_attention(q, k, v, window=(2, 0), backend=backend),
    )


def test_bias_and_causal_intersect(backend: str) -> None:
    q, k, v, _ = qkv()
    mask = rand(2, 1, 9, 9) > -0.5
    both = mask & torch.ones(9, 9, dtype=torch.bool).tril()
    near(
        value_residual_attention(q, k, v, causal=True, attn_bias=mask, backend=backend),
        value_residual_attention(q, k, v, attn_bias=both, backend=backend),
    )


@pytest.mark.parametrize(
    "shape", [(), (HKV, 1), (HKV, D), (2, 9, 1, 1), (2, 9, HKV, 1), (2, 9, HKV, D)]
)
def test_coefficients_broadcast(backend: str, shape: tuple[int, ...]) -> None:
    q, k, v, v_first = qkv()
    own, first = rand(*shape, seed=8), rand(*shape, seed=9)
    out, mixed = value_residual_attention(
        q, k, v, v_first, own, first, return_mixed_value=True, backend=backend
    )
    near(mixed, own * v + first * v_first)
    near(out, value_residual_attention(q, k, mixed, backend=backend))


def test_polarity(backend: str) -> None:
    q, k, v, v_first = qkv()
    _, mixed = value_residual_attention(
        q, k, v, v_first, lambda_v=1.0, lambda_first=0.0, return_mixed_value=True, backend=backend
    )
    assert torch.equal(mixed, v)
    _, mixed = value_residual_attention(
        q, k, v, v_first, lambda_v=0.0, lambda_first=1.0, return_mixed_value=True, backend=backend
    )
    assert torch.equal(mixed, v_first)


def test_floats_are_ignored_beside_one_source(backend: str) -> None:
    q, k, v, _ = qkv()
    expected = value_residual_attention(q, k, v, backend=backend)
    assert torch.equal(value_residual_attention(q, k, v, None, 3.0, 4.0, backend=backend), expected)
    assert torch.equal(value_residual_attention(q, k, None, v, 3.0, 4.0, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_results(backend: str, dtype: torch.dtype) -> None:
    leaves = [x.requires_grad_() for x in qkv(dtype=dtype)]
    extra = [rand(HKV, 1).requires_grad_(), rand(H, dtype=dtype).requires_grad_()]
    bias = rand(9, 9).requires_grad_()
    arguments: list[Any] = [*leaves, extra[0]]
    out, lse, mixed = value_residual_attention(
        *arguments, sinks=extra[1], attn_bias=bias, return_lse=True,
        return_mixed_value=True, backend=backend,
    )  # fmt: skip
    assert (out.dtype, lse.dtype, mixed.dtype) == (dtype, torch.float32, dtype)
    assert out.shape == (2, 9, H, D)
    assert lse.shape == (2, H, 9)
    assert mixed.shape == (2, 9, HKV, D)
    (out.float().sum() + lse.sum() + mixed.float().sum()).backward()
    for leaf in (*leaves, *extra, bias):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert leaf.grad.shape == leaf.shape


def test_float64_goes_to_the_reference() -> None:
    tensors = [x.double() for x in qkv()]
    assert explain(value_residual_attention, *tensors).backend == "reference"
    assert value_residual_attention(*tensors).dtype == torch.float64


@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_returns_what_was_asked_in_order(backend: str, lse: bool, mixed: bool) -> None:
    q, k, v, v_first = qkv(k_len=7)
    got = value_residual_attention(
        q, k, v, v_first, return_lse=lse, return_mixed_value=mixed, backend=backend
    )
    if not (lse or mixed):
        assert isinstance(got, Tensor)
        return
    shapes = [(2, 9, H, D)] + [(2, H, 9)] * lse + [(2, 7, HKV, D)] * mixed
    assert [tuple(x.shape) for x in got] == shapes


def test_results_alias_no_input(backend: str) -> None:
    q, k, v, _ = qkv()
    _, mixed = value_residual_attention(q, k, v, return_mixed_value=True, backend=backend)
    assert mixed.data_ptr() != v.data_ptr()
    assert torch.equal(mixed, v)


def test_lse_merges_split_keys(backend: str) -> None:
    q, k, v, _ = qkv()
    whole, whole_lse = value_residual_attention(q, k, v, return_lse=True, backend=backend)
    parts = [
        value_residual_attention(q, k[:, s], v[:, s], return_lse=True, backend=backend)
        for s in (slice(0, 4), slice(4, 9))
    ]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    near(lse, whole_lse)
    weights = [torch.exp(part - lse).transpose(1, 2)[..., None] for _, part in parts]
    near(parts[0][0] * weights[0] + parts[1][0] * weights[1], whole)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kind", ["mask", "bias", "window"])
def test_empty_rows_are_zeros(backend: str, sinks: bool, kind: str) -> None:
    leaves = [x.requires_grad_() for x in qkv(q_len=9, k_len=9 if kind != "window" else 4)]
    sink = rand(H).requires_grad_() if sinks else None
    options: dict[str, Any] = {"causal": True} if kind == "window" else {}
    if kind != "window":
        mask = (torch.arange(9) >= 5)[:, None]
        options["attn_bias"] = mask if kind == "mask" else torch.where(mask, 0.0, -torch.inf)
    out, lse = value_residual_attention(
        *leaves, sinks=sink, return_lse=True, backend=backend, **options
    )
    empty = slice(0, 5)
    assert out[:, empty].eq(0).all()
    expected = torch.full((2, H, 5), -torch.inf) if sink is None else sink[:, None].expand(2, H, 5)
    near(lse[:, :, empty], expected)
    (out[:, empty].sum() + (lse[:, :, empty].sum() if sinks else 0)).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.eq(0).all()
    if sink is not None:
        assert sink.grad is not None
        near(sink.grad, torch.full((H,), 10.0))


def test_gradient_through_minus_infinity_is_not_nan(backend: str) -> None:
    leaves = [x.requires_grad_() for x in qkv(k_len=4)]
    out, lse = value_residual_attention(*leaves, causal=True, return_lse=True, backend=backend)
    torch.autograd.backward([out, lse], [torch.ones_like(out), torch.ones_like(lse)])
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_and_infinity_propagate_as_in_the_reference(
    kernels: str, where: str, bad: float
) -> None:
    tensors = dict(zip(("q", "k", "v"), qkv(1, 40, 40), strict=False))
    tensors[where][0, 7, 1, 3] = bad
    got = value_residual_attention(**tensors, return_lse=True, backend=kernels)  # type: ignore[arg-type]
    expected = value_residual_attention(**tensors, return_lse=True, backend="reference")  # type: ignore[arg-type]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("magnitude", [1e-30, 1e4, 1e18])
def test_extreme_magnitudes(backend: str, magnitude: float) -> None:
    q, k, v, v_first = qkv()
    out = value_residual_attention(q * magnitude, k, v, v_first, backend=backend)
    wide = [x.double() for x in (q * magnitude, k, v, v_first)]
    near(out, value_residual_attention(*wide).float(), 1e-4)


def test_nothing_beyond_the_sequences_matters(backend: str) -> None:
    case = AttentionCase(
        lengths=((5, 5), (3, 9)), lambda_v="token", lambda_first="scalar",
        return_lse=True, return_mixed_value=True,
    )  # fmt: skip
    clean = attention_inputs(case)
    tensors = {}
    for name, x in clean.tensors.items():
        tail = torch.full((4, *x.shape[1:]), torch.nan)
        per_token = name in ("q", "k", "v", "v_first", "lambda_v")
        tensors[name] = torch.cat([x, tail]) if per_token else x.clone()
        if x.is_floating_point():
            tensors[name].requires_grad_()
            x.requires_grad_()
    kept = clean.function(**clean.tensors, **clean.options, backend=backend)
    got = clean.function(**tensors, **clean.options, backend=backend)
    assert torch.equal(got[0][:8], kept[0])
    assert torch.equal(got[1][:, :8], kept[1])
    assert torch.equal(got[2][:14], kept[2])
    assert got[0][8:].eq(0).all()
    assert got[1][:, 8:].eq(-torch.inf).all()
    assert got[2][14:].eq(0).all()
    torch.autograd.backward(kept, [torch.ones_like(x) for x in kept])
    torch.autograd.backward(got, [torch.ones_like(x) for x in got])
    for name, x in clean.tensors.items():
        if x.grad is not None:
            found = tensors[name].grad
            assert found is not None
            rows = x.shape[0] if x.dim() else None
            torch.testing.assert_close(found[:rows] if rows else found, x.grad)
            if rows:
                assert found[rows:].eq(0).all()


def test_packed_lse_layout(backend: str) -> None:
    case = AttentionCase(lengths=((5, 5), (3, 9)), return_lse=True)
    inputs = attention_inputs(case)
    _, lse = inputs.function(**inputs.tensors, **inputs.options, backend=backend)
    assert lse.shape == (4, 8)


def test_strides_are_read_in_place_and_a_strided_last_axis_is_copied_once(kernels: str) -> None:
    q, k, v, v_first = qkv()
    options: dict[str, Any] = {"backend": kernels}
    expected = value_residual_attention(q, k, v, v_first, **options)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, v_first)]
    assert torch.equal(value_residual_attention(*heads_first, **options), expected)
    assert not explain(value_residual_attention, *heads_first, **options).notes
    strided = q.repeat_interleave(2, dim=-1)[..., ::2]
    assert torch.equal(value_residual_attention(strided, k, v, v_first, **options), expected)
    (note,) = explain(value_residual_attention, strided, k, v, v_first, **options).notes
    assert "q is copied once" in note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_run_to_run(backend: str, dtype: torch.dtype) -> None:
    # An interpreter takes long over what a library does in a moment.
    q_len, k_len = (40, 70) if backend == "triton" else (200, 300)
    case = AttentionCase(
        dtype=dtype, q_len=q_len, k_len=k_len, lambda_v="scalar", lambda_first="head", sinks=True,
        bias="per_key", return_lse=True,
    )  # fmt: skip

    def once() -> list[Tensor]:
        inputs = attention_inputs(case)
        leaves = [x.requires_grad_() for x in inputs.tensors.values()]
        outputs = inputs.function(**inputs.tensors, **inputs.options, backend=backend)
        return [*outputs, *torch.autograd.grad(outputs, leaves, inputs.grads)]

    first = once()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_inputs_are_untouched(backend: str) -> None:
    inputs = attention_inputs(AttentionCase(lambda_v="full", sinks=True, bias="additive"))
    before = {name: x.clone() for name, x in inputs.tensors.items()}
    leaves = [x.requires_grad_() for x in inputs.tensors.values()]
    out = inputs.function(**inputs.tensors, **inputs.options, backend=backend)
    torch.autograd.grad(out, leaves, inputs.grads)
    assert all(torch.equal(before[name], x) for name, x in inputs.tensors.items())


def test_one_source_of_gradient_at_a_time(backend: str) -> None:
    """Gradients that nobody wants are not computed, and the others do not change for it."""
    inputs = attention_inputs(
        AttentionCase(lambda_v="scalar", lambda_first="head", sinks=True, bias="per_key")
    )
    leaves = [x.requires_grad_() for x in inputs.tensors.values()]
    out = inputs.function(**inputs.tensors, **inputs.options, backend=backend)
    every = torch.autograd.grad(out, leaves, inputs.grads)
    for chosen, expected in zip(leaves, every, strict=True):
        for leaf in leaves:
            leaf.requires_grad_(leaf is chosen)
        out = inputs.function(**inputs.tensors, **inputs.options, backend=backend)
        (got,) = torch.autograd.grad(out, [chosen], inputs.grads)
        near(got, expected)
        for leaf in leaves:
            leaf.requires_grad_()


def test_the_same_tensor_twice(backend: str) -> None:
    x = rand(1, 6, 2, 8).requires_grad_()
    out = value_residual_attention(x, x, x, x, backend=backend)
    (got,) = torch.autograd.grad(out.square().sum(), x)
    wide = x.detach().double().requires_grad_()
    exact = value_residual_attention(wide, wide, wide, wide)
    (expected,) = torch.autograd.grad(exact.square().sum(), wide)
    near(got, expected.float(), 1e-5)


def test_varlen_without_gaps_equals_the_batch(backend: str) -> None:
    q, k, v, v_first = qkv()
    offsets = torch.tensor([0, 9, 18], dtype=torch.int32)
    packed = value_residual_attention_varlen(
        *(x.flatten(0, 1) for x in (q, k, v, v_first)),
        cu_seqlens_q=offsets,
        cu_seqlens_k=offsets,
        max_seqlen_q=9,
        max_seqlen_k=9,
        causal=True,
        backend=backend,
    )
    near(
        packed.view_as(q),
        value_residual_attention(q, k, v, v_first, causal=True, backend=backend),
    )


def test_meta_tensors_give_shapes() -> None:
    q, k, v, v_first = (x.to("meta") for x in qkv(k_len=7))
    out, lse = value_residual_attention(q, k, v, v_first, causal=True, return_lse=True)
    assert out.is_meta
    assert (out.shape, lse.shape) == ((2, 9, H, D), (2, H, 9))

"""Exclusive self-attention and the output gate in every drop-in, against separate passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import explain, value_residual_attention
from resformer_kernels.compat import flash_attn, flash_attn_3
from resformer_kernels.compat import scaled_dot_product_attention as sdpa
from tests.compat.documented import offsets, rand

B, T, HQ, HKV, D = 2, 5, 4, 2, 8
CU, TABLE = offsets(T, T), torch.arange(B, dtype=torch.int32)[:, None]
LENGTHS: dict[str, Any] = {
    "cu_seqlens_q": CU, "cu_seqlens_k": CU, "max_seqlen_q": T, "max_seqlen_k": T
}  # fmt: skip

Tensors = dict[str, Any]


def inputs(dtype: torch.dtype = torch.float64) -> Tensors:
    """q, k, v and v_first of the call without an epilogue, and the epilogue."""
    values = {"k": 1, "v": 2, "v_first": 3}
    kv = {name: rand(B, T, HKV, D, dtype=dtype).mul(i).cos() for name, i in values.items()}
    return {"q": rand(B, T, HQ, D, dtype=dtype), **kv}


EPILOGUES: dict[str, Callable[[torch.dtype], Tensors]] = {
    "all of it": lambda _: {"exclusive": 1.0},
    "per head, wide bound": lambda dtype: {
        "exclusive": rand(HQ, 1, dtype=dtype), "exclusive_eps": 3.0
    },
    "per token and head, both": lambda dtype: {
        "exclusive": rand(B, T, HQ, 1, dtype=dtype).sin(),
        "out_gate": rand(B, T, HQ, 1, dtype=dtype),
    },
    "a gate per channel": lambda dtype: {"out_gate": rand(B, T, HQ, D, dtype=dtype)},
}  # fmt: skip


def packed(x: Any) -> Any:
    """Without the batch axis."""
    return x.flatten(0, 1) if isinstance(x, Tensor) and x.dim() == 4 else x


def heads_first(x: Any) -> Any:
    return x.transpose(-3, -2) if isinstance(x, Tensor) and x.dim() > 2 else x


def laid_out(layout: Callable[[Any], Any], tensors: Tensors) -> Tensors:
    return {name: layout(x) for name, x in tensors.items()}


def from_cache(function: Any, x: Tensors, **options: Any) -> Tensor:
    k_cache, v_cache = (x["q"].new_full((B, T + 2, HKV, D), torch.nan) for _ in range(2))
    given = {name: y for name, y in x.items() if name != "q"}
    out: Tensor = function(
        x["q"], k_cache, v_cache, **given, cache_seqlens=0, causal=True, **options
    )
    return out


def packed_from_cache(x: Tensors, **options: Any) -> Tensor:
    rows = laid_out(packed, x)
    k_cache, v_cache = (x["q"].new_full((B, T + 2, HKV, D), torch.nan) for _ in range(2))
    given = {name: y for name, y in rows.items() if name != "q"}
    out: Tensor = flash_attn_3.flash_attn_with_kvcache(
        rows["q"], k_cache, v_cache, **given, cache_seqlens=0, cu_seqlens_q=CU, cu_seqlens_k_new=CU,
        max_seqlen_q=T, causal=True, **options,
    )  # fmt: skip
    return out.unflatten(0, (B, T))


def from_pages(x: Tensors, **options: Any) -> Tensor:
    rest = {name: packed(y) for name, y in x.items() if name not in ("k", "v", "v_first")}
    rest |= {"lambda_v": 0.5, "lambda_first": 0.5}
    mixed = (x["v"] + x["v_first"]) / 2
    out: Tensor = flash_attn.flash_attn_varlen_func(
        rest.pop("q"), x["k"], mixed, **LENGTHS, causal=True, block_table=TABLE, **rest, **options
    )
    return out.unflatten(0, (B, T))


def stacked(x: Tensors, names: str, axis: int) -> tuple[Tensor, Tensors]:
    """(k and v, or q, k and v, along a new axis; the rest)."""
    rest = {name: y for name, y in x.items() if name not in names}
    return torch.stack([x[name] for name in names], axis), rest


def with_kv(x: Tensors, **options: Any) -> Tensor:
    kv, rest = stacked(x, "kv", 2)
    out: Tensor = flash_attn.flash_attn_kvpacked_func(kv=kv, causal=True, **rest, **options)
    return out


def with_packed_kv(x: Tensors, **options: Any) -> Tensor:
    kv, rest = stacked(laid_out(packed, x), "kv", 1)
    function = flash_attn.flash_attn_varlen_kvpacked_func
    out: Tensor = function(kv=kv, causal=True, **LENGTHS, **rest, **options)
    return out.unflatten(0, (B, T))


def as_query_heads(x: Tensors) -> Tensors:
    """The call with as many KV heads as query heads."""
    names = ("k", "v", "v_first")
    return {
        name: y.repeat_interleave(HQ // HKV, dim=2) if name in names else y for name, y in x.items()
    }


def with_qkv(x: Tensors, **options: Any) -> Tensor:
    qkv, rest = stacked(as_query_heads(x), "qkv", 2)
    out: Tensor = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True, **rest, **options)
    return out


def with_packed_qkv(x: Tensors, **options: Any) -> Tensor:
    qkv, rest = stacked(laid_out(packed, as_query_heads(x)), "qkv", 1)
    function = flash_attn.flash_attn_varlen_qkvpacked_func
    out: Tensor = function(qkv, CU, T, causal=True, **rest, **options)
    return out.unflatten(0, (B, T))


def with_heads_of_qkv(x: Tensors, **options: Any) -> Tensor:
    rest = {name: y for name, y in x.items() if name not in "qkv"}
    qkv = torch.cat([x["q"], x["k"], x["v"]], dim=2)
    function = flash_attn_3.flash_attn_qkvpacked_func
    out: Tensor = function(qkv, causal=True, num_heads_q=HQ, **rest, **options)
    return out


def varlen(function: Any, x: Tensors, **options: Any) -> Tensor:
    out: Tensor = function(**laid_out(packed, x), causal=True, **LENGTHS, **options)
    return out.unflatten(0, (B, T))


def of_torch(x: Tensors, **options: Any) -> Tensor:
    given = laid_out(heads_first, x)
    names = {"q": "query", "k": "key", "v": "value"}
    given = {names.get(name, name): y for name, y in given.items()}
    if isinstance(given.get("exclusive"), Tensor) and given["exclusive"].dim() == 2:
        given["exclusive"] = given["exclusive"][:, None]
    return sdpa(is_causal=True, enable_gqa=True, **given, **options).transpose(1, 2)


WITH_GRADIENT: dict[str, Callable[..., Tensor]] = {
    "2, separate": lambda x, **o: flash_attn.flash_attn_func(**x, causal=True, **o),
    "2, kv": with_kv,
    "2, qkv": with_qkv,
    "2, packed": lambda x, **o: varlen(flash_attn.flash_attn_varlen_func, x, **o),
    "2, packed kv": with_packed_kv,
    "2, packed qkv": with_packed_qkv,
    "3, separate": lambda x, **o: flash_attn_3.flash_attn_func(**x, causal=True, **o),
    "3, qkv": with_heads_of_qkv,
    "3, packed": lambda x, **o: varlen(flash_attn_3.flash_attn_varlen_func, x, **o),
    "sdpa": of_torch,
}
CALLS: dict[str, Callable[..., Tensor]] = {
    **WITH_GRADIENT,
    "2, pages": from_pages,
    "2, cache": lambda x, **o: from_cache(flash_attn.flash_attn_with_kvcache, x, **o),
    "3, cache": lambda x, **o: from_cache(flash_attn_3.flash_attn_with_kvcache, x, **o),
    "3, packed cache": packed_from_cache,
}
"""Every drop-in, as a function of (B, T, H, D) tensors."""


def passes(
    y: Tensor,
    own: Tensor,
    exclusive: Any = 0.0,
    exclusive_eps: float = 1e-6,
    out_gate: Any = 1.0,
) -> Tensor:
    """What follows the softmax as a model has it without a fused call."""
    unit = own / own.norm(dim=-1, keepdim=True).clamp(min=exclusive_eps)
    return out_gate * (y - exclusive * (y * unit).sum(-1, keepdim=True) * unit)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("call", CALLS)
def test_separate_passes(call: str, epilogue: str) -> None:
    x, finish = inputs(), EPILOGUES[epilogue](torch.float64)
    out = CALLS[call]({**x, **finish}, backend="reference")
    y = CALLS[call](x, backend="reference")
    own = ((x["v"] + x["v_first"]) / 2).repeat_interleave(HQ // HKV, dim=2)
    torch.testing.assert_close(out, passes(y, own, **finish))


@pytest.mark.parametrize("call", WITH_GRADIENT)
def test_gradients_are_those_of_separate_passes(call: str) -> None:
    x, finish = inputs(), EPILOGUES["per token and head, both"](torch.float64)
    leaves = [y.requires_grad_() for y in (*x.values(), *finish.values())]
    out = CALLS[call]({**x, **finish}, backend="reference")
    y = CALLS[call](x, backend="reference")
    own = ((x["v"] + x["v_first"]) / 2).repeat_interleave(HQ // HKV, dim=2)
    grad = rand(*out.shape).cos()
    found = torch.autograd.grad(out, leaves, grad)
    expected = torch.autograd.grad(passes(y, own, **finish), leaves, grad)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("call", CALLS)
def test_the_public_function(call: str, epilogue: str, backend: str) -> None:
    x = {**inputs(torch.float32), **EPILOGUES[epilogue](torch.float32)}
    expected = value_residual_attention(**x, causal=True, backend=backend)
    found = CALLS[call](x, backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_queries_that_are_not_used() -> None:
    """The factors of rows follow their queries, whatever lies in the rows that are not used."""
    x = laid_out(packed, {**inputs(), **EPILOGUES["per token and head, both"](torch.float64)})
    used = torch.tensor([2, 4], dtype=torch.int32)
    options: dict[str, Any] = {"causal": True, "backend": "reference"}
    there = torch.tensor([0, 1, 5, 6, 7, 8])
    for name in ("exclusive", "out_gate"):
        x[name][[2, 3, 4, 9]] = torch.nan
    out = flash_attn_3.flash_attn_varlen_func(**x, **LENGTHS, seqused_q=used, **options)
    by_query = ("q", "exclusive", "out_gate")
    shorter = {name: y[there] if name in by_query else y for name, y in x.items()}
    lengths = {**LENGTHS, "cu_seqlens_q": offsets(2, 4)}
    expected = flash_attn_3.flash_attn_varlen_func(**shorter, **lengths, **options)
    torch.testing.assert_close(out[there], expected)
    assert out[[2, 3, 4, 9]].eq(0).all()


@pytest.mark.parametrize(("tq", "tk"), [(3, 5), (1, 5), (5, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_positions_in_torchs_order(tq: int, tk: int, causal: bool) -> None:
    """PyTorch aligns a causal mask's first query and key; without one the last ones stand
    together."""
    q, k, v = rand(B, HQ, tq, D), rand(B, HQ, tk, D).cos(), rand(B, HQ, tk, 6)
    if causal and tq > tk:
        with pytest.raises(NotImplementedError, match="exclusive must be None: with is_causal"):
            sdpa(q, k, v, is_causal=True, exclusive=1.0)
        gate = rand(HQ, 1, 6)
        plain = sdpa(q, k, v, is_causal=True)
        torch.testing.assert_close(sdpa(q, k, v, is_causal=True, out_gate=gate), gate * plain)
        return
    at = torch.arange(tq) + (0 if causal else tk - tq)
    own = torch.where((at >= 0)[:, None], v[:, :, at.clamp(min=0)], 0.0)
    plain = sdpa(q, k, v, is_causal=causal)
    out = sdpa(q, k, v, is_causal=causal, exclusive=1.0)
    torch.testing.assert_close(out, passes(plain, own, 1.0))


def test_leading_axes_of_torchs_order() -> None:
    q, k, v = rand(2, 1, HQ, 4, D), rand(1, 3, HQ, 4, D), rand(2, 3, HQ, 4, 6)
    plain = sdpa(q, k, v)
    for shape in ((), (4, 1), (HQ, 1, 1), (3, 1, 4, 1), (2, 1, HQ, 1, 1)):
        exclusive, gate = rand(*shape), rand(*(shape or (1,)))
        out = sdpa(q, k, v, exclusive=exclusive, out_gate=gate)
        torch.testing.assert_close(out, passes(plain, v, exclusive, out_gate=gate))
    two = sdpa(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0], out_gate=rand(4, 6), exclusive=rand(4, 1))
    one = sdpa(q[0, 0, 0], k[0, 0, 0], v[0, 0, 0])
    torch.testing.assert_close(two, passes(one, v[0, 0, 0], rand(4, 1), out_gate=rand(4, 6)))


BAD: dict[str, tuple[Tensors, type[Exception], str]] = {
    "exclusive": (
        {"exclusive": torch.ones(HQ, 2, 1)},
        ValueError,
        "exclusive must be a float",
    ),
    "no number": ({"exclusive": "1"}, TypeError, "exclusive must be a number or a tensor"),
    "no last axis": ({"exclusive": torch.ones(HQ, T, 0)}, ValueError, "exclusive must be a float"),
    "heads": (
        {"out_gate": torch.ones(HQ, 1)},
        ValueError,
        r"one per query head .* \(4, 1, 1\)",
    ),
    "a float": ({"out_gate": 0.5}, TypeError, "out_gate must be a tensor or None"),
    "bound": ({"exclusive_eps": 0.0}, ValueError, "exclusive_eps must be from"),
    "dtype": ({"out_gate": torch.ones(HQ, 1, 1).half()}, TypeError, "out_gate must be float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_in_torchs_order(name: str) -> None:
    changed, error, message = BAD[name]
    x = torch.ones(B, HQ, T, D)
    for kind in (error, RuntimeError):
        with pytest.raises(kind, match=message):
            sdpa(x, x, x, **changed)


def test_a_coefficient_without_a_last_axis_is_named() -> None:
    x = torch.ones(B, HQ, T, D)
    with pytest.raises(ValueError, match="lambda_v must be a float or a tensor that broadcasts"):
        sdpa(x, x, x, v_first=x, lambda_v=torch.ones(T, 0))


def test_nested_tensors_are_refused() -> None:
    rows = [torch.ones(HQ, length, D).transpose(0, 1) for length in (3, 4)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)
    for changed in ({"exclusive": 1.0}, {"out_gate": torch.ones(())}):
        (name,) = changed
        with pytest.raises(NotImplementedError, match=f"{name} must be None: it does not follow"):
            sdpa(x, x, x, **changed)


@pytest.mark.parametrize("name", ["exclusive", "out_gate"])
def test_over_a_cache_there_is_no_gradient(name: str) -> None:
    x = inputs()
    factor = torch.ones(HQ, 1, dtype=torch.float64, requires_grad=True)
    out = from_cache(flash_attn.flash_attn_with_kvcache, {**x, name: factor})
    with pytest.raises(RuntimeError, match="has no gradient"):
        out.sum().backward()


def test_nothing_is_copied(native: str) -> None:
    x = laid_out(heads_first, inputs(torch.float32))
    finish = laid_out(heads_first, EPILOGUES["per token and head, both"](torch.float32))
    found = explain(sdpa, x["q"], x["k"], x["v"], enable_gqa=True, **finish)
    assert found.backend == native
    assert not found.notes

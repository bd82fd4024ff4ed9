"""The attention calls of nanochat and modded-nanogpt, as they are written there, on the drop-ins.

Both import FlashAttention 3's interface under a name, so the drop-in takes its place there; what
PyTorch computes one sequence at a time says what is right.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from resformer_kernels.compat import flash_attn_3 as flash_attn
from resformer_kernels.compat import flash_attn_3 as flash_attn_interface
from resformer_kernels.compat import scaled_dot_product_attention
from tests.compat.documented import offsets, rand

B, T, H, HKV, D = 2, 12, 4, 2, 8

WINDOWS = [(-1, 0), (-1, -1), (4, 0), (T, 0)]
"""(left, right): full context, as nanochat writes it now and before, a short and a long window."""


def attended(q: Tensor, k: Tensor, v: Tensor, left: int, scale: float | None = None) -> Tensor:
    """Causal attention (B, T, H, D) with its last query at the last key."""
    tq, tk = q.shape[1], k.shape[1]
    distance = torch.arange(tq)[:, None] + tk - tq - torch.arange(tk)
    seen = (distance >= 0) & (distance <= (tk if left < 0 else left))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


def assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    ours, theirs = ((x, *torch.autograd.grad(x.square().sum(), leaves)) for x in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window_size", WINDOWS)
def test_nanochat_trains(window_size: tuple[int, int]) -> None:
    leaves = [rand(B, T, heads, D).requires_grad_() for heads in (H, HKV, HKV)]
    q, k, v = leaves
    y = flash_attn.flash_attn_func(q, k, v, causal=True, window_size=window_size)
    assert_same(y, attended(q, k, v, window_size[0]), leaves)


@pytest.mark.parametrize("window_size", WINDOWS)
def test_nanochat_generates(window_size: tuple[int, int]) -> None:
    """A prompt, then a token at a time, over a cache that its layers share out."""
    layers = 2
    q, k, v = rand(B, T, H, D), rand(B, T, HKV, D).sin(), rand(B, T, HKV, D).cos()
    k_cache, v_cache = (torch.zeros(layers, B, T + 3, HKV, D, dtype=q.dtype) for _ in range(2))
    cache_seqlens = torch.zeros(B, dtype=torch.int32)
    start = 0
    for new in (5, 1, 1, 4, 1):
        part = slice(start, start + new)
        for layer in range(layers):
            y = flash_attn.flash_attn_with_kvcache(
                q[:, part], k_cache[layer], v_cache[layer], k=k[:, part] + layer, v=v[:, part],
                cache_seqlens=cache_seqlens, causal=True, window_size=window_size,
            )  # fmt: skip
            seen = slice(start + new)
            expected = attended(q[:, part], k[:, seen] + layer, v[:, seen], window_size[0])
            torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        cache_seqlens += new
        start += new
    assert torch.equal(k_cache[1, :, :T], k + 1)


@pytest.mark.parametrize("window", [-1, 4, T])
@pytest.mark.parametrize("tq", [T, 5, 1])
def test_nanochat_without_flash_attention(tq: int, window: int) -> None:
    """Its fallback: a causal call, a single query over a slice of the keys, or a bool mask."""
    leaves = [rand(B, n, heads, D).requires_grad_() for n, heads in ((tq, H), (T, HKV), (T, HKV))]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    enable_gqa = q.size(1) != k.size(1)
    if (window < 0 or window >= tq) and tq == T:
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)
    elif tq == 1:
        start = max(0, T - (window + 1)) if 0 <= window < T else 0
        y = scaled_dot_product_attention(
            q, k[:, :, start:, :], v[:, :, start:, :], is_causal=False, enable_gqa=enable_gqa
        )
    else:
        row, column = (T - tq) + torch.arange(tq).unsqueeze(1), torch.arange(T).unsqueeze(0)
        mask = column <= row
        if 0 <= window < T:
            mask = mask & ((row - column) <= window)
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)
    left = -1 if window >= T else window
    assert_same(y.transpose(1, 2), attended(leaves[0], leaves[1], leaves[2], left), leaves)


def documents(q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor, left: int, scale: float) -> Tensor:
    """Every document by itself."""
    bounds = zip(seqlens[:-1].tolist(), seqlens[1:].tolist(), strict=True)
    parts = [slice(a, b) for a, b in bounds if a < b]
    return torch.cat([attended(q[:, x], k[:, x], v[:, x], left, scale) for x in parts], dim=1)


@pytest.mark.parametrize("bm_size", [3, 128])
@pytest.mark.parametrize("paired", [False, True])
def test_modded_nanogpt_trains(paired: bool, bm_size: int) -> None:
    """One row of documents; their ends repeat the row's, up to a fixed number of them."""
    heads, attn_scale, max_len = 4, 0.12, 16
    leaves = [rand(1, 16, heads, D).add(i / 4).requires_grad_() for i in range(3)]
    q, k, v = leaves
    seqlens = offsets(3, 7, 1, 5, 0, 0, 0)
    if paired:
        # Adjacent heads in turn: documents of twice the length, half the heads.
        q, k, v = (x.reshape(1, 32, heads // 2, D) for x in leaves)
        seqlens, max_len = 2 * seqlens, 2 * max_len
    y = flash_attn_interface.flash_attn_varlen_func(
        q[0], k[0], v[0], cu_seqlens_q=seqlens, cu_seqlens_k=seqlens, max_seqlen_q=max_len,
        max_seqlen_k=max_len, causal=True, softmax_scale=attn_scale, window_size=(bm_size, 0),
    )  # fmt: skip
    assert_same(y[None], documents(q, k, v, seqlens, bm_size, attn_scale), leaves)

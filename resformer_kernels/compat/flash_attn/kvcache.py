"""`flash_attn_with_kvcache`: append keys and values to a cache, then attend over it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from resformer_kernels._core.select import explainable
from resformer_kernels.compat._arguments import refuse_alibi
from resformer_kernels.compat._cached import MIXED, Cache, Packed, Run, attend
from resformer_kernels.compat._errors import runtime_errors
from resformer_kernels.compat._flash import Added, Scores
from resformer_kernels.compat._rotary import Rotary


@runtime_errors(**MIXED)
@explainable
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    v_first: Tensor | None = None,
    lambda_v: float | Tensor = 0.5,
    lambda_first: float | Tensor = 0.5,
    exclusive: float | Tensor | None = None,
    exclusive_eps: float | None = None,
    out_gate: Tensor | None = None,
    backend: str = "auto",
) -> Any:
    """FlashAttention 2's function; with v_first, V' = lambda_v * v + lambda_first * v_first is
    mixed once and appended (Zhou et al., arXiv 2410.17897).

    Args:
        q: (B, Tq, Hq, Dk).
        k_cache: (Bc, T, Hkv, Dk), Bc = B unless cache_batch_idx is given, or (pages, page_size,
            Hkv, Dk) with block_table, of any page_size. Written in place where k is given.
        v_cache: the same with Dv. Written in place where values are given.
        k: (B, Tnew, Hkv, Dk), appended at cache_seqlens, or None.
        v: (B, Tnew, Hkv, Dv), likewise. k without v appends keys only, as an SVFormer layer after
            the first does: its v_cache is the first layer's.
        rotary_cos: (positions, rotary_dim / 2), float32 or q's dtype, positions at least the
            cache's length, rotary_dim at most Dk. The first rotary_dim channels of k are rotated
            by their position in the cache, those of query i by position cache_seqlens + i where
            causal or a window is given, else by cache_seqlens. Needs k.
        rotary_sin: the same shape and dtypes.
        cache_seqlens: (B,) int32 or an int: tokens in the cache before the append. None: the cache
            is full, and nothing is appended.
        cache_batch_idx: (B,) int32: the row of the cache, or of block_table, of each sequence.
        cache_leftpad: (B,) int32: the cache position where each sequence begins.
        block_table: (B, pages a sequence) int32; of any number of rows with cache_batch_idx.
        softmax_scale: multiplies q.k. None: 1 / sqrt(Dk).
        causal: query i, at key p = i + length - Tq, sees keys up to p (bottom-right).
        window_size: (left, right), inclusive: p - left to p + right; -1 is unbounded.
        softcap: scores become softcap * tanh(scores / softcap); 0 for none.
        rotary_interleaved: rotate channels 2i and 2i + 1 as a pair; else i and i + rotary_dim / 2.
        alibi_slopes: must be None; ALiBi is not supported.
        num_splits: parts of the keys in split-KV decoding; 0 chooses.
        return_softmax_lse: also return softmax_lse.
        v_first: (B, Tnew, Hkv, Dv), the first layer's values of the new tokens, or None. With v
            None it is appended unmixed.
        lambda_v: multiplies v: a float, or a tensor that broadcasts to v's shape.
        lambda_first: multiplies v_first; the same forms.
        exclusive, exclusive_eps, out_gate: exclusive self-attention and a gate of out, fused, as in
            `attention_with_kvcache`: v' is the cached value at p. Where cache_leftpad hides p
            nothing is excluded.
        backend: as in `attention_with_kvcache`. A name never falls back.

    Returns:
        out (B, Tq, Hq, Dv), or (out, softmax_lse) with softmax_lse (B, Hq, Tq) float32, -inf for a
        query that attends to no key (FlashAttention: +inf).

    Raises:
        NotImplementedError: alibi_slopes. Otherwise as `attention_with_kvcache`.
    """
    refuse_alibi(alibi_slopes, "attention_with_kvcache takes no additive bias")
    return attend(
        q,
        (k, v),
        Cache(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table),
        Added(v_first, lambda_v, lambda_first, exclusive, exclusive_eps, out_gate),
        Scores(softmax_scale, causal, window_size, softcap),
        Rotary(rotary_cos, rotary_sin, rotary_interleaved),
        Packed(),
        Run(num_splits, return_softmax_lse, backend),
    )

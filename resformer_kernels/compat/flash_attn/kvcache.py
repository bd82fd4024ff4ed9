"""`flash_attn_with_kvcache`: append keys and values to a cache, then attend over it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_flag, check_tensor, describe
from resformer_kernels._core.select import explainable, explaining
from resformer_kernels.attention.record import check_scale, check_window
from resformer_kernels.compat._refused import refuse_alibi
from resformer_kernels.kvcache.api import attention_with_kvcache
from resformer_kernels.mix.api import mix_values


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
        cache_batch_idx: (B,) int32: the cache row of each sequence. Not with block_table.
        cache_leftpad: (B,) int32: the cache position where each sequence begins.
        block_table: (B, pages a sequence) int32.
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
        backend: as in `attention_with_kvcache`. A name never falls back.

    Returns:
        out (B, Tq, Hq, Dv), or (out, softmax_lse) with softmax_lse (B, Hq, Tq) float32, -inf for a
        query that attends to no key (FlashAttention: +inf).

    Raises:
        NotImplementedError: alibi_slopes. Otherwise as `attention_with_kvcache`.
    """
    refuse_alibi(alibi_slopes, "attention_with_kvcache takes no additive bias")
    check_flag("rotary_interleaved", rotary_interleaved)
    check_flag("return_softmax_lse", return_softmax_lse)
    check_tensor("q", q, 4, "(batch, time, heads, head_dim)")
    check_tensor("k_cache", k_cache, 4, "(batch, time, kv_heads, head_dim)")
    window = check_window(window_size, causal, "window_size")
    table = _rows(cache_batch_idx, block_table, q)
    capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_seqlens is None:
        if k is not None or v is not None or v_first is not None:
            raise ValueError("cache_seqlens must be given where tokens are appended, got None")
        cache_seqlens = capacity
    for name, values in (("v", v), ("v_first", v_first)):
        if values is not None and k is None:
            raise ValueError(f"{name} must be None where k is: values are appended with their keys")
    rotates = rotary_cos is not None or rotary_sin is not None
    if rotates:
        tables: tuple[Any, Any] = (rotary_cos, rotary_sin)
        _check_rotary(q, k, tables, cache_seqlens, capacity)
    new_values = v_first if v is None else v
    # Neither changes a shape or a dtype.
    if not explaining():
        if rotates and k is not None:
            stepping = window != (-1, -1)
            q, k = _rotated(q, k, tables, cache_seqlens, stepping, rotary_interleaved)
        if v is not None and v_first is not None:
            new_values = mix_values((v, v_first), (lambda_v, lambda_first))
    return attention_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        new_values,
        cache_seqlens=cache_seqlens,
        block_table=table,
        key_mask=_leftpad_mask(cache_leftpad, q, capacity),
        causal=False,
        window=window,
        scale=check_scale(softmax_scale, max(q.shape[-1], 1), "softmax_scale"),
        softcap=softcap,
        num_splits=num_splits,
        return_lse=return_softmax_lse,
        backend=backend,
    )


def _check_ints(name: str, value: Any, q: Tensor) -> None:
    batch = q.shape[0]
    check_tensor(name, value, 1, f"({batch},), int32")
    if value.shape[0] != batch:
        raise ValueError(f"{name} must be ({batch},), int32, got shape {tuple(value.shape)}")
    if value.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {value.dtype}")
    if value.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {value.device}")


def _rows(cache_batch_idx: Any, block_table: Any, q: Tensor) -> Any:
    """The op's block_table. A cache row is a page as long as the cache."""
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError("cache_batch_idx must be None with block_table, which names the pages")
        check_tensor("block_table", block_table, 2, "(batch, pages), int32")
        return block_table
    if cache_batch_idx is None:
        return None
    _check_ints("cache_batch_idx", cache_batch_idx, q)
    return cache_batch_idx[:, None]


def _leftpad_mask(cache_leftpad: Any, q: Tensor, capacity: int) -> Tensor | None:
    if cache_leftpad is None:
        return None
    _check_ints("cache_leftpad", cache_leftpad, q)
    return torch.arange(capacity, device=q.device) >= cache_leftpad[:, None]


def _check_rotary(q: Tensor, k: Any, tables: tuple[Any, Any], seqlens: Any, capacity: int) -> None:
    if k is None:
        raise ValueError("rotary_cos and rotary_sin must be None without k, which they rotate")
    check_tensor("k", k, 4, "(batch, new_tokens, kv_heads, head_dim)")
    for name, table in zip(("rotary_cos", "rotary_sin"), tables, strict=True):
        check_tensor(name, table, 2, "(positions, rotary_dim / 2)")
        if table.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"{name} must be float32 or q's dtype {q.dtype}, got {table.dtype}")
        if table.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {table.device}")
        if table.shape != tables[0].shape:
            raise ValueError(
                f"{name} must have rotary_cos's shape {tuple(tables[0].shape)}, "
                f"got {tuple(table.shape)}"
            )
        if table.shape[0] < capacity or 2 * table.shape[1] > q.shape[-1]:
            raise ValueError(
                f"{name} must be (positions, rotary_dim / 2), at least the cache's {capacity} "
                f"positions and a rotary_dim of at most {q.shape[-1]}, got {tuple(table.shape)}"
            )
    if not isinstance(seqlens, (Tensor, int)):
        raise TypeError(f"cache_seqlens must be an int or int32, got {describe(seqlens)}")


def _rotated(
    q: Tensor,
    k: Tensor,
    tables: tuple[Tensor, Tensor],
    cache_seqlens: int | Tensor,
    stepping: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """q and k, rotated. `stepping`: query i is i positions after the first, else all share one."""
    start = cache_seqlens
    if not isinstance(start, Tensor):
        start = torch.full((q.shape[0],), start, device=q.device)
    steps = torch.arange(max(q.shape[1], k.shape[1]), device=q.device)
    # The op refuses a length that lies outside the cache; that check comes after this.
    places = (start.long()[:, None] + steps).clamp(0, tables[0].shape[0] - 1)
    q_places = places[:, : q.shape[1]] if stepping else places[:, :1].expand(-1, q.shape[1])
    cos, sin = tables
    return (
        _rotate(q, cos[q_places], sin[q_places], interleaved),
        _rotate(k, cos[places[:, : k.shape[1]]], sin[places[:, : k.shape[1]]], interleaved),
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (B, T, H, D), its first channels rotated by cos and sin (B, T, rotary_dim / 2)."""
    half = cos.shape[-1]
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
    axis = -1 if interleaved else -2
    first, second = pairs.unbind(axis)
    cos, sin = cos[:, :, None].to(wide), sin[:, :, None].to(wide)
    both = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=axis)
    return torch.cat((both.flatten(-2).to(x.dtype), rest), dim=-1)

"""Checks of the arguments of `attention_with_kvcache`.

They read metadata alone, except lengths and page numbers where these lie in host memory. Nothing
is written before every check has passed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import (
    DTYPES,
    alone,
    autocast_dtype,
    check_device,
    check_flag,
    check_tensor,
    integer,
    readable,
)
from resformer_kernels.attention.record import check_scale, check_sinks, check_softcap, check_window
from resformer_kernels.kvcache.record import ATTEND, QUANTISED, KVCacheCall

MOST_SPLITS = 1024


def check_call(
    q: Tensor,
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    *,
    cache_seqlens: Any,
    block_table: Any,
    key_mask: Any = None,
    causal: Any = False,
    window: Any = (-1, -1),
    scale: Any = None,
    softcap: Any = 0.0,
    sinks: Any = None,
    k_scale: Any,
    v_scale: Any,
    num_splits: Any = 0,
    return_lse: Any = False,
) -> KVCacheCall:
    """Check and normalise the arguments of the public function, whose q is a batch."""
    q, k, v = check_tensors(q, k_cache, v_cache, k, v, paged=block_table is not None)
    check_scales("k_scale", k_scale, k_cache)
    check_scales("v_scale", v_scale, v_cache)
    capacity = check_table(block_table, q, k_cache)
    left, right = check_window(window, causal)
    check_sinks(sinks, q)
    check_flag("return_lse", return_lse)
    call = KVCacheCall(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        cache_seqlens=check_lengths(cache_seqlens, q),
        block_table=block_table,
        key_mask=check_mask(key_mask, q, capacity),
        window_left=left,
        window_right=right,
        scale=check_scale(scale, q.shape[-1]),
        softcap=check_softcap(softcap),
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        num_splits=check_splits(num_splits),
        return_lse=return_lse,
    )
    check_contents(call, cache_seqlens)
    refuse_gradients(call)
    return call


def check_tensors(
    q: Tensor, k_cache: Any, v_cache: Any, k: Any, v: Any, *, paged: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Check queries, caches and new tokens; return q, k and v in the dtype that autocast wants."""
    axes = "(pages, page_size, kv_heads, {})" if paged else "(batch, capacity, kv_heads, {})"
    check_tensor("k_cache", k_cache, 4, axes.format("head_dim"))
    check_tensor("v_cache", v_cache, 4, axes.format("value_head_dim"))
    for name, new, dim in (("k", k, "head_dim"), ("v", v, "value_head_dim")):
        if new is not None:
            check_tensor(name, new, 4, f"(batch, new_tokens, kv_heads, {dim}) or None")
    q, k, v = _autocast(q, k_cache), *(x if x is None else _autocast(x, k_cache) for x in (k, v))
    _check_dtypes(q, k_cache, v_cache, k, v)
    _check_caches(q, k_cache, v_cache)
    _check_new_tokens(q, {"k": (k, k_cache), "v": (v, v_cache)})
    return q, k, v


def _autocast(x: Tensor, cache: Tensor) -> Tensor:
    """Under autocast queries and new tokens follow the cache, whose dtype is fixed."""
    wanted = autocast_dtype(x.device, x.dtype)
    if cache.dtype in QUANTISED:
        return x.to(wanted)
    # What is 16-bit already follows too; float64 is left alone, as autocast leaves it.
    casts = autocast_dtype(x.device, torch.float32) is not torch.float32
    follows = casts and x.is_floating_point() and x.dtype is not torch.float64
    return x.to(cache.dtype) if follows and cache.dtype in DTYPES else x


def _check_dtypes(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None
) -> None:
    if q.dtype not in DTYPES:
        raise TypeError(f"q must be float32, bfloat16, float16 or float64, got {q.dtype}")
    if k_cache.dtype != q.dtype and k_cache.dtype not in QUANTISED:
        raise TypeError(
            f"k_cache must have q's dtype {q.dtype}, or be int8 or float8 with k_scale and "
            f"v_scale, got {k_cache.dtype}"
        )
    check_device("k_cache", k_cache, q.device)
    for name, x, owner, like in (
        ("v_cache", v_cache, "k_cache", k_cache),
        ("k", k, "q", q),
        ("v", v, "q", q),
    ):
        if x is not None and x.dtype != like.dtype:
            raise TypeError(f"{name} must have {owner}'s dtype {like.dtype}, got {x.dtype}")
        if x is not None:
            check_device(name, x, q.device)


def _check_caches(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    if q.shape[-1] != k_cache.shape[-1] or q.shape[-1] < 1:
        raise ValueError(
            f"k_cache must have q's head_dim {q.shape[-1]}, at least 1, on its last axis, "
            f"got shape {tuple(k_cache.shape)}"
        )
    if v_cache.shape[:-1] != k_cache.shape[:-1] or v_cache.shape[-1] < 1:
        raise ValueError(
            f"v_cache must have k_cache's axes {tuple(k_cache.shape[:-1])} and a head_dim of at "
            f"least 1, got shape {tuple(v_cache.shape)}"
        )
    heads, kv_heads = q.shape[2], k_cache.shape[2]
    if kv_heads < 1 or heads < 1 or heads % kv_heads != 0:
        raise ValueError(
            f"q must have a multiple of k_cache's heads: q has {heads} (shape {tuple(q.shape)}), "
            f"k_cache has {kv_heads} (shape {tuple(k_cache.shape)})"
        )


def _check_new_tokens(q: Tensor, pairs: dict[str, tuple[Tensor | None, Tensor]]) -> None:
    """Shapes of k and v, each given with its cache, and that both caches can be written."""
    given = {name: (new, cache) for name, (new, cache) in pairs.items() if new is not None}
    for name, (new, cache) in given.items():
        _check_batch(name, new, q)
        if new.shape[2:] != cache.shape[2:]:
            raise ValueError(
                f"{name} must have {name}_cache's heads and head_dim {tuple(cache.shape[2:])}, "
                f"got shape {tuple(new.shape)}"
            )
    if len(given) == 2 and given["k"][0].shape[1] != given["v"][0].shape[1]:
        raise ValueError(
            f"v must have k's {given['k'][0].shape[1]} new tokens, got shape "
            f"{tuple(given['v'][0].shape)} (k alone appends keys only, v alone values only)"
        )
    for name, (_, cache) in pairs.items() if given else ():
        if any(n > 1 and step == 0 for n, step in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(
                f"{name}_cache is expanded (shape {tuple(cache.shape)}, strides "
                f"{cache.stride()}): several of its elements share one memory location and cannot "
                "be appended to"
            )


def _check_batch(name: str, x: Tensor, q: Tensor) -> None:
    if x.shape[0] != q.shape[0]:
        raise ValueError(
            f"{name} must have q's batch size {q.shape[0]}, got shape {tuple(x.shape)}"
        )


def check_scales(name: str, scales: Any, cache: Tensor) -> None:
    if cache.dtype not in QUANTISED:
        if scales is not None:
            raise ValueError(
                f"{name} belongs to an int8 or float8 cache, these are {cache.dtype}: "
                "it must be None"
            )
        return
    shape = tuple(cache.shape[:3])
    axes = f"{shape}, one scale per token and KV head of the {cache.dtype} cache"
    if scales is None:
        raise ValueError(f"{name} must be {axes}, got None")
    check_tensor(name, scales, 3, axes)
    if tuple(scales.shape) != shape:
        raise ValueError(f"{name} must be {axes}, got shape {tuple(scales.shape)}")
    if scales.dtype is not torch.float32:
        raise TypeError(f"{name} must be float32, got {scales.dtype}")
    check_device(name, scales, cache.device)


def check_table(block_table: Any, q: Tensor, k_cache: Tensor) -> int:
    """Check block_table, or the batch of a contiguous cache; return a sequence's capacity."""
    if block_table is not None:
        _check_int32_rows("block_table", block_table, 2, "(batch, max_pages), int32", q)
        return int(block_table.shape[1]) * k_cache.shape[1]
    if k_cache.shape[0] != q.shape[0]:
        raise ValueError(
            f"k_cache must have q's batch size {q.shape[0]}, got shape {tuple(k_cache.shape)} "
            "(a paged cache comes with block_table)"
        )
    return k_cache.shape[1]


def _check_int32_rows(name: str, x: Any, rank: int, axes: str, q: Tensor) -> None:
    """An int32 tensor with a row for each of q's sequences."""
    check_tensor(name, x, rank, axes)
    if x.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {x.dtype}")
    check_device(name, x, q.device)
    _check_batch(name, x, q)


def check_lengths(cache_seqlens: Any, q: Tensor) -> Tensor:
    """cache_seqlens as an int32 tensor (B,)."""
    batch = q.shape[0]
    if alone(cache_seqlens):
        number: Any = integer("cache_seqlens", cache_seqlens)
        if not -(2**31) <= number < 2**31:
            raise ValueError(f"cache_seqlens must fit in 32 bits, got {number}")
        return q.new_empty((batch,), dtype=torch.int32).fill_(number)
    # A number in the text would be a constant of a compiled graph.
    axes = "(batch,), int32, one length per sequence, or an int for all"
    _check_int32_rows("cache_seqlens", cache_seqlens, 1, axes, q)
    lengths: Tensor = cache_seqlens
    return lengths


def check_mask(key_mask: Any, q: Tensor, capacity: int) -> Tensor | None:
    """key_mask as (B, T') or None."""
    if key_mask is None:
        return None
    batch = q.shape[0]
    rank = 4 if isinstance(key_mask, Tensor) and key_mask.dim() == 4 else 2
    # A number in this text would be a constant of a compiled graph.
    check_tensor("key_mask", key_mask, rank, "(batch, T) or (batch, 1, 1, T), bool")
    if key_mask.dtype is not torch.bool:
        raise TypeError(f"key_mask must be bool (True = attend), got {key_mask.dtype}")
    check_device("key_mask", key_mask, q.device)
    shape = tuple(key_mask.shape)
    if shape[1:-1] not in ((), (1, 1)) or shape[0] not in (1, batch) or shape[-1] > capacity:
        raise ValueError(
            f"key_mask must be ({batch}, T) or ({batch}, 1, 1, T), T at most the cache's "
            f"{capacity} tokens, got shape {shape}"
        )
    flat: Tensor = key_mask[:, 0, 0] if rank == 4 else key_mask
    return flat.expand(batch, flat.shape[1])


def check_splits(num_splits: Any) -> int:
    """num_splits, an int in its range."""
    num_splits = integer("num_splits", num_splits)
    if not 0 <= num_splits <= MOST_SPLITS:
        raise ValueError(
            f"num_splits must be 0 (chosen by length) or 1 to {MOST_SPLITS}, got {num_splits}"
        )
    return int(num_splits)


def check_contents(call: KVCacheCall, given: Tensor | int) -> None:
    """Lengths (`given` as cache_seqlens), mask and page numbers, where they lie in host memory."""
    if not isinstance(given, Tensor):
        lengths = [given] if call.q.shape[0] > 0 else []
    elif readable(call.cache_seqlens):
        lengths = call.cache_seqlens.tolist()
    else:
        return
    new, capacity = call.new_tokens, call.capacity
    for b, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"cache_seqlens must be 0 or more, got {length} at index {b}")
        if length + new > capacity:
            raise ValueError(
                f"the cache is full: sequence {b} has {length} tokens (cache_seqlens) and "
                f"{new} are appended, its capacity is {capacity}{_pages_of(call)}"
            )
        if call.key_mask is not None and length + new > call.key_mask.shape[1]:
            raise ValueError(
                f"key_mask must cover sequence {b}'s {length + new} tokens, "
                f"got {call.key_mask.shape[1]} columns"
            )
    if call.block_table is not None and readable(call.block_table):
        _check_pages(call.block_table.cpu(), call.cache_seqlens.cpu() + new, call.k_cache)


def _pages_of(call: KVCacheCall) -> str:
    if call.block_table is None:
        return ""
    return f", the {call.block_table.shape[1]} pages of its row of block_table"


def _check_pages(table: Tensor, ends: Tensor, k_cache: Tensor) -> None:
    pages, page_size = k_cache.shape[:2]
    used = torch.arange(table.shape[1]) * page_size < ends[:, None]
    wrong = (used & ((table < 0) | (table >= pages))).nonzero()
    if len(wrong):
        b, i = wrong[0].tolist()
        raise ValueError(
            f"block_table must name pages 0 to {pages - 1} for every token, "
            f"got {int(table[b, i])} for page {i} of sequence {b}"
        )


def refuse_gradients(call: KVCacheCall) -> None:
    """RuntimeError where an argument requires a gradient."""
    if not torch.is_grad_enabled():
        return
    for name, value in call._asdict().items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise RuntimeError(
                f"{ATTEND} has no gradient, and {name} requires one: call it under "
                "torch.no_grad(), or train with value_residual_attention"
            )

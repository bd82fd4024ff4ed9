"""Checks of the arguments of `attention_with_kvcache`.

They read metadata alone, except what `contents` reads. Nothing is written before every check has
passed.
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
)
from resformer_kernels._core.op import refuse_vmap
from resformer_kernels.attention.epilogue import check_epilogue
from resformer_kernels.attention.record import check_scale, check_sinks, check_softcap, check_window
from resformer_kernels.kvcache import packed
from resformer_kernels.kvcache.contents import check_contents
from resformer_kernels.kvcache.record import ATTEND, QUANTISED, KVCacheCall

MOST_SPLITS = 1024

_ROWS = (4, "(batch, time, heads, head_dim)")
_PACKED = (3, "(total_q, heads, head_dim)")


def check_call(
    q: Tensor,
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    *,
    cache_seqlens: Any,
    block_table: Any,
    v_block_table: Any = None,
    cu_seqlens_q: Any = None,
    max_seqlen_q: Any = None,
    cu_seqlens_k_new: Any = None,
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
    out: Any = None,
    exclusive: Any = None,
    exclusive_eps: Any = None,
    out_gate: Any = None,
) -> KVCacheCall:
    """Check and normalise the arguments of the public function."""
    check_tensor("q", q, *(_ROWS if cu_seqlens_q is None else _PACKED))
    refuse_vmap(ATTEND, (q,))
    batch, longest = q.shape[0], 0
    if cu_seqlens_q is not None:
        longest = packed.check_queries(q, cu_seqlens_q, max_seqlen_q)
        batch = cu_seqlens_q.shape[0] - 1
        q = q[None]
    if cu_seqlens_k_new is not None:
        packed.check_new_tokens(k, v, cu_seqlens_k_new, batch)
        k, v = (x if x is None else x[None] for x in (k, v))
    q, k, v = check_tensors(q, k_cache, v_cache, k, v, paged=block_table is not None)
    _check_shapes(q, (k_cache, v_cache), (k, v), v_block_table is not None)
    for name, x in (("k", k), ("v", v)) if cu_seqlens_k_new is None else ():
        if x is not None:
            _check_batch(name, x, batch)
    check_scales("k_scale", k_scale, k_cache)
    check_scales("v_scale", v_scale, v_cache)
    _check_tables(block_table, v_block_table, q, k_cache, batch)
    left, right = check_window(window, causal)
    check_sinks(sinks, q)
    check_flag("return_lse", return_lse)
    call = KVCacheCall(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        cache_seqlens=check_lengths(cache_seqlens, q, batch),
        block_table=block_table,
        v_block_table=v_block_table,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=longest,
        cu_seqlens_k_new=cu_seqlens_k_new,
        key_mask=key_mask,
        window_left=left,
        window_right=right,
        scale=check_scale(scale, q.shape[-1]),
        softcap=check_softcap(softcap),
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        num_splits=check_splits(num_splits),
        return_lse=return_lse,
        out=None,
        **check_epilogue(exclusive, exclusive_eps, out_gate, q, v_cache.shape[3], k_cache.shape[2]),
    )
    call = call._replace(
        key_mask=check_mask(key_mask, q, batch, call.capacity), out=check_out(out, call)
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


def _check_shapes(
    q: Tensor,
    caches: tuple[Tensor, Tensor],
    added: tuple[Tensor | None, Tensor | None],
    own_table: bool,
) -> None:
    """Shapes of the caches (keys, values) and of what is added; `own_table`: V has pages of its own
    number."""
    k_cache, v_cache = caches
    if q.shape[-1] != k_cache.shape[-1] or q.shape[-1] < 1:
        raise ValueError(
            f"k_cache must have q's head_dim {q.shape[-1]}, at least 1, on its last axis, "
            f"got shape {tuple(k_cache.shape)}"
        )
    first = 1 if own_table else 0
    if v_cache.shape[first:-1] != k_cache.shape[first:-1] or v_cache.shape[-1] < 1:
        raise ValueError(
            f"v_cache must have k_cache's axes {tuple(k_cache.shape[first:-1])} and a head_dim of "
            f"at least 1, got shape {tuple(v_cache.shape)}"
        )
    heads, kv_heads = q.shape[2], k_cache.shape[2]
    if kv_heads < 1 or heads < 1 or heads % kv_heads != 0:
        raise ValueError(
            f"q must have a multiple of k_cache's heads: q has {heads} (shape {tuple(q.shape)}), "
            f"k_cache has {kv_heads} (shape {tuple(k_cache.shape)})"
        )
    _check_new_tokens(dict(zip("kv", zip(added, caches, strict=True), strict=True)))


def _check_new_tokens(pairs: dict[str, tuple[Tensor | None, Tensor]]) -> None:
    """Shapes of k and v, each given with its cache, and that both caches can be written."""
    given = {name: (new, cache) for name, (new, cache) in pairs.items() if new is not None}
    for name, (new, cache) in given.items():
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
        check_writable(f"{name}_cache", cache)


def check_writable(name: str, cache: Tensor) -> None:
    """ValueError where elements of a cache share memory."""
    if any(n > 1 and step == 0 for n, step in zip(cache.shape, cache.stride(), strict=True)):
        raise ValueError(
            f"{name} is expanded (shape {tuple(cache.shape)}, strides {cache.stride()}): several "
            "of its elements share one memory location and cannot be appended to"
        )


def _check_batch(name: str, x: Tensor, batch: int) -> None:
    if x.shape[0] != batch:
        raise ValueError(f"{name} must have q's batch size {batch}, got shape {tuple(x.shape)}")


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


def _check_tables(
    block_table: Any, v_block_table: Any, q: Tensor, k_cache: Tensor, batch: int
) -> None:
    """Check the block tables, or the batch of a contiguous cache."""
    if block_table is None and v_block_table is not None:
        raise ValueError("v_block_table must be None where block_table is: it is V's own beside it")
    for name, table in (("block_table", block_table), ("v_block_table", v_block_table)):
        if table is not None:
            _check_int32_rows(name, table, 2, "(batch, max_pages), int32", q, batch)
    if block_table is None and k_cache.shape[0] != batch:
        raise ValueError(
            f"k_cache must have q's batch size {batch}, got shape {tuple(k_cache.shape)} "
            "(a paged cache comes with block_table)"
        )


def _check_int32_rows(name: str, x: Any, rank: int, axes: str, q: Tensor, batch: int) -> None:
    """An int32 tensor with a row for each of q's sequences."""
    check_tensor(name, x, rank, axes)
    if x.dtype is not torch.int32:
        raise TypeError(f"{name} must be int32, got {x.dtype}")
    check_device(name, x, q.device)
    _check_batch(name, x, batch)


def check_lengths(cache_seqlens: Any, q: Tensor, batch: int) -> Tensor:
    """cache_seqlens as an int32 tensor (B,)."""
    if alone(cache_seqlens):
        number: Any = integer("cache_seqlens", cache_seqlens)
        if not -(2**31) <= number < 2**31:
            raise ValueError(f"cache_seqlens must fit in 32 bits, got {number}")
        return q.new_empty((batch,), dtype=torch.int32).fill_(number)
    # A number in the text would be a constant of a compiled graph.
    axes = "(batch,), int32, one length per sequence, or an int for all"
    _check_int32_rows("cache_seqlens", cache_seqlens, 1, axes, q, batch)
    lengths: Tensor = cache_seqlens
    return lengths


def check_mask(key_mask: Any, q: Tensor, batch: int, capacity: int) -> Tensor | None:
    """key_mask as (B, T') or None."""
    if key_mask is None:
        return None
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


def check_out(out: Any, call: KVCacheCall) -> Tensor | None:
    """out as (batch, time, heads, value_head_dim), where results are written."""
    if out is None:
        return None
    packed_rows = call.cu_seqlens_q is not None
    wanted = call.out_shape[1:] if packed_rows else call.out_shape
    # A number in this text would be a constant of a compiled graph.
    check_tensor("out", out, len(wanted), "of the result's shape")
    if tuple(out.shape) != wanted:
        raise ValueError(f"out must have the result's shape {wanted}, got {tuple(out.shape)}")
    if out.dtype != call.q.dtype:
        raise TypeError(f"out must have q's dtype {call.q.dtype}, got {out.dtype}")
    check_device("out", out, call.q.device)
    steps = tuple(zip(out.shape, out.stride(), strict=True))
    if any(n > 1 and step == 0 for n, step in steps) or (out.shape[-1] > 1 and steps[-1][1] != 1):
        raise ValueError(
            "out must have a contiguous last axis, and memory of its own for each element, got "
            f"strides {out.stride()}"
        )
    written: Tensor = out[None] if packed_rows else out
    return written


def refuse_gradients(call: KVCacheCall) -> None:
    """RuntimeError where an argument requires a gradient."""
    if not torch.is_grad_enabled():
        return
    for name, value in zip(call._fields, call, strict=True):
        if isinstance(value, Tensor) and value.requires_grad:
            raise RuntimeError(
                f"{ATTEND} has no gradient, and {name} requires one: call it under "
                "torch.no_grad(), or train with value_residual_attention"
            )

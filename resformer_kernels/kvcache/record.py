"""The normalised form of a call of `attention_with_kvcache`, and the checks that lead to it.

Checks read metadata alone, except lengths and page numbers where they lie in host memory. Nothing
is written before every one of them has passed.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core import strides
from resformer_kernels._core.checks import (
    DTYPES,
    autocast_dtype,
    check_flag,
    check_tensor,
    describe,
    readable,
)
from resformer_kernels._core.strides import needs_copy
from resformer_kernels.attention.record import (
    check_scale,
    check_sinks,
    check_softcap,
    check_window,
)

_INT = (int, torch.SymInt)

QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
"""Storage with a scale per token and head: value = code * scale."""
MOST_SPLITS = 1024

_CONTIGUOUS, _PAGED = "(batch, capacity, kv_heads, {})", "(pages, page_size, kv_heads, {})"
_NEW = "(batch, new_tokens, kv_heads, {})"


ATTEND = "attention_with_kvcache"
READ_ONLY = ("q", "k", "v")
"""Arguments that are copied where their last axis is not contiguous; caches never are."""


class KVCacheCall(NamedTuple):
    """A validated call, its fields in the order of the op's arguments; one form per meaning.

    `block_table` None: caches (B, T, Hkv, D); else (pages, page_size, Hkv, D). `cache_seqlens` is
    int32 (B,) on q's device, the lengths before k and v are appended. `key_mask` is bool
    (B, T'), T' at most the capacity; keys from T' on are masked. `causal` is folded into
    window_right; -1 is unbounded on either side.
    """

    q: Tensor
    k_cache: Annotated[Tensor, "Tensor(a!)"]
    v_cache: Annotated[Tensor, "Tensor(b!)"]
    k: Tensor | None
    v: Tensor | None
    cache_seqlens: Tensor
    block_table: Tensor | None
    key_mask: Tensor | None
    k_scale: Annotated[Tensor | None, "Tensor(c!)?"]
    v_scale: Annotated[Tensor | None, "Tensor(d!)?"]
    window_left: int
    window_right: int
    scale: float
    softcap: float
    sinks: Tensor | None
    num_splits: int
    return_lse: bool

    @property
    def new_tokens(self) -> int:
        """How many tokens the call appends."""
        new = self.k if self.k is not None else self.v
        return 0 if new is None else new.shape[1]

    @property
    def capacity(self) -> int:
        """The most tokens that a sequence of this cache can have."""
        if self.block_table is None:
            return self.k_cache.shape[1]
        return self.block_table.shape[1] * self.k_cache.shape[1]


def check_call(
    q: Tensor,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    *,
    cache_seqlens: Any,
    block_table: Any = None,
    key_mask: Any = None,
    causal: Any = True,
    window: Any = (-1, -1),
    scale: Any = None,
    softcap: Any = 0.0,
    sinks: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    num_splits: Any = 0,
    return_lse: Any = False,
) -> KVCacheCall:
    """The arguments of the public function, checked and normalised. Nothing is written."""
    axes = _CONTIGUOUS if block_table is None else _PAGED
    check_tensor("k_cache", k_cache, 4, axes.format("head_dim"))
    check_tensor("v_cache", v_cache, 4, axes.format("value_head_dim"))
    for name, tensor, dim in (("k", k, "head_dim"), ("v", v, "value_head_dim")):
        if tensor is not None:
            check_tensor(name, tensor, 4, f"{_NEW.format(dim)} or None")
    q, k, v = _autocast(q, k_cache), *(x if x is None else _autocast(x, k_cache) for x in (k, v))
    _check_dtypes(q, k_cache, v_cache, k, v)
    _check_shapes(q, k_cache, v_cache, k, v)
    if k is not None or v is not None:
        _check_writable(k_cache, v_cache)
    _check_scales(k_cache, v_cache, k_scale, v_scale, q)
    capacity = k_cache.shape[1]
    if block_table is not None:
        _check_table(block_table, q)
        capacity = block_table.shape[1] * k_cache.shape[1]
    elif k_cache.shape[0] != q.shape[0]:
        raise ValueError(
            f"k_cache must have q's batch size {q.shape[0]}, got shape {tuple(k_cache.shape)} "
            "(a paged cache comes with block_table)"
        )
    left, right = check_window(window, causal)
    check_sinks(sinks, q)
    check_flag("return_lse", return_lse)
    call = KVCacheCall(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k,
        v=v,
        cache_seqlens=_lengths(cache_seqlens, q),
        block_table=block_table,
        key_mask=_mask(key_mask, q, capacity),
        k_scale=k_scale,
        v_scale=v_scale,
        window_left=left,
        window_right=right,
        scale=check_scale(scale, q.shape[-1]),
        softcap=check_softcap(softcap),
        sinks=sinks,
        num_splits=_splits(num_splits),
        return_lse=return_lse,
    )
    _check_contents(call, cache_seqlens)
    _refuse_gradients(call)
    return call


def copy_notes(call: KVCacheCall) -> list[str]:
    """What is copied before the kernel, for `explain`."""
    return strides.copy_notes(call, READ_ONLY)


def strided_cache_reason(call: KVCacheCall) -> str | None:
    """Why kernels that read caches in place cannot serve the call; None when they can."""
    for name, cache in (("k_cache", call.k_cache), ("v_cache", call.v_cache)):
        if needs_copy(cache):
            return (
                f"{name}'s last axis has stride {cache.stride(-1)}, not 1, and a cache is never "
                "copied"
            )
    return None


def _autocast(x: Tensor, cache: Tensor) -> Tensor:
    """Under autocast queries and new tokens follow the cache, whose dtype is fixed."""
    if autocast_dtype(x.device, x.dtype) == x.dtype:
        return x
    return x.to(autocast_dtype(x.device, x.dtype) if cache.dtype in QUANTISED else cache.dtype)


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
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"v_cache must have k_cache's dtype {k_cache.dtype}, got {v_cache.dtype}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor is not None and tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {tensor.dtype}")
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")


def _check_shapes(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, v: Tensor | None
) -> None:
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
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new is None:
            continue
        if new.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name} must have q's batch size {q.shape[0]}, got shape {tuple(new.shape)}"
            )
        if new.shape[2:] != cache.shape[2:]:
            raise ValueError(
                f"{name} must have {name}_cache's heads and head_dim {tuple(cache.shape[2:])}, "
                f"got shape {tuple(new.shape)}"
            )
    if k is not None and v is not None and k.shape[1] != v.shape[1]:
        raise ValueError(
            f"v must have k's {k.shape[1]} new tokens, got shape {tuple(v.shape)} "
            "(k alone appends keys only, v alone values only)"
        )


def _check_writable(k_cache: Tensor, v_cache: Tensor) -> None:
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if any(
            size > 1 and step == 0 for size, step in zip(cache.shape, cache.stride(), strict=True)
        ):
            raise ValueError(
                f"{name} is expanded (shape {tuple(cache.shape)}, strides {cache.stride()}): "
                "several of its elements share one memory location and cannot be appended to"
            )


def _check_scales(k_cache: Tensor, v_cache: Tensor, k_scale: Any, v_scale: Any, q: Tensor) -> None:
    for name, scale, cache in (("k_scale", k_scale, k_cache), ("v_scale", v_scale, v_cache)):
        if cache.dtype not in QUANTISED:
            if scale is not None:
                raise ValueError(
                    f"{name} belongs to an int8 or float8 cache, these are {cache.dtype}: "
                    "it must be None"
                )
            continue
        shape = tuple(cache.shape[:3])
        axes = f"{shape}, one scale per token and KV head of the {cache.dtype} cache"
        if scale is None:
            raise ValueError(f"{name} must be {axes}, got None")
        check_tensor(name, scale, 3, axes)
        if tuple(scale.shape) != shape:
            raise ValueError(f"{name} must be {axes}, got shape {tuple(scale.shape)}")
        if scale.dtype is not torch.float32:
            raise TypeError(f"{name} must be float32, got {scale.dtype}")
        if scale.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {scale.device}")


def _check_table(block_table: Any, q: Tensor) -> None:
    check_tensor("block_table", block_table, 2, "(batch, max_pages), int32")
    if block_table.dtype is not torch.int32:
        raise TypeError(f"block_table must be int32, got {block_table.dtype}")
    if block_table.device != q.device:
        raise ValueError(f"block_table must be on q's device {q.device}, got {block_table.device}")
    if block_table.shape[0] != q.shape[0]:
        raise ValueError(
            f"block_table must have q's batch size {q.shape[0]}, "
            f"got shape {tuple(block_table.shape)}"
        )


def _lengths(cache_seqlens: Any, q: Tensor) -> Tensor:
    batch, any_int = q.shape[0], cache_seqlens
    if isinstance(cache_seqlens, _INT) and not isinstance(cache_seqlens, bool):
        if not -(2**31) <= cache_seqlens < 2**31:
            raise ValueError(f"cache_seqlens must fit in 32 bits, got {cache_seqlens}")
        return q.new_empty((batch,), dtype=torch.int32).fill_(any_int)
    if not isinstance(cache_seqlens, Tensor):
        raise TypeError(
            f"cache_seqlens must be an int or an int32 tensor ({batch},), "
            f"got {describe(cache_seqlens)}"
        )
    check_tensor("cache_seqlens", cache_seqlens, 1, f"({batch},), int32, one length per sequence")
    if cache_seqlens.dtype is not torch.int32:
        raise TypeError(f"cache_seqlens must be int32, got {cache_seqlens.dtype}")
    if cache_seqlens.device != q.device:
        raise ValueError(
            f"cache_seqlens must be on q's device {q.device}, got {cache_seqlens.device}"
        )
    if cache_seqlens.shape[0] != batch:
        raise ValueError(
            f"cache_seqlens must have q's batch size {batch}, "
            f"got shape {tuple(cache_seqlens.shape)}"
        )
    return cache_seqlens


def _mask(key_mask: Any, q: Tensor, capacity: int) -> Tensor | None:
    if key_mask is None:
        return None
    batch = q.shape[0]
    wanted = f"({batch}, T) or ({batch}, 1, 1, T), T at most the cache's {capacity} tokens"
    if not isinstance(key_mask, Tensor):
        raise TypeError(f"key_mask must be a bool tensor {wanted}, got {describe(key_mask)}")
    if key_mask.layout is not torch.strided:
        raise TypeError(f"key_mask must be a dense tensor, got layout {key_mask.layout}")
    if key_mask.dtype is not torch.bool:
        raise TypeError(f"key_mask must be bool (True = attend), got {key_mask.dtype}")
    if key_mask.device != q.device:
        raise ValueError(f"key_mask must be on q's device {q.device}, got {key_mask.device}")
    shape = tuple(key_mask.shape)
    padding = len(shape) == 4 and shape[1:3] == (1, 1)
    if not (len(shape) == 2 or padding) or shape[0] not in (1, batch) or shape[-1] > capacity:
        raise ValueError(f"key_mask must be {wanted}, got shape {shape}")
    flat: Tensor = key_mask[:, 0, 0] if padding else key_mask
    return flat.expand(batch, flat.shape[1])


def _splits(num_splits: Any) -> int:
    if not isinstance(num_splits, int) or isinstance(num_splits, bool):
        raise TypeError(f"num_splits must be an int, got {describe(num_splits)}")
    if not 0 <= num_splits <= MOST_SPLITS:
        raise ValueError(
            f"num_splits must be 0 (chosen by length) or 1 to {MOST_SPLITS}, got {num_splits}"
        )
    return num_splits


def _check_contents(call: KVCacheCall, given: Any) -> None:
    """Lengths, mask and page numbers, where they lie in host memory."""
    if isinstance(given, _INT):
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
                f"{new} are appended, its capacity is {capacity}"
            )
        if call.key_mask is not None and length + new > call.key_mask.shape[1]:
            raise ValueError(
                f"key_mask must cover sequence {b}'s {length + new} tokens, "
                f"got {call.key_mask.shape[1]} columns"
            )
    if call.block_table is not None and readable(call.block_table):
        ends = call.cache_seqlens.cpu() + new
        _check_pages(call.block_table, ends, call.k_cache)


def _check_pages(block_table: Tensor, ends: Tensor, k_cache: Tensor) -> None:
    pages, page_size = k_cache.shape[:2]
    table = block_table.cpu()
    used = torch.arange(table.shape[1]) * page_size < ends[:, None]
    wrong = (used & ((table < 0) | (table >= pages))).nonzero()
    if len(wrong):
        b, i = wrong[0].tolist()
        raise ValueError(
            f"block_table must name pages 0 to {pages - 1} for every token, "
            f"got {int(table[b, i])} for page {i} of sequence {b}"
        )


def _refuse_gradients(call: KVCacheCall) -> None:
    if not torch.is_grad_enabled():
        return
    for name, value in zip(call._fields, call, strict=True):
        if isinstance(value, Tensor) and value.requires_grad:
            raise RuntimeError(
                f"attention_with_kvcache has no gradient, and {name} requires one: call it under "
                "torch.no_grad(), or train with value_residual_attention"
            )

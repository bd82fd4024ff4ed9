"""The record of a call of `attention_with_kvcache`: the op's schema is made from it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core import strides

ATTEND = "attention_with_kvcache"

QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of a cache with a scale per token and head: value = code * scale."""

READ_ONLY = ("q", "k", "v")
"""Arguments that are copied where their last axis is not contiguous; caches never are."""


class KVCacheCall(NamedTuple):
    """A validated call, its fields in the order of the op's arguments.

    `block_table` None: caches (B, T, Hkv, D); else (pages, page_size, Hkv, D). `cache_seqlens` is
    int32 (B,) on q's device, the lengths before k and v are appended. `key_mask` is bool (B, T'),
    T' at most the capacity; keys from T' on are masked. `causal` is folded into window_right; -1
    is unbounded on either side.
    """

    q: Tensor
    k_cache: Annotated[Tensor, "Tensor(a!)"]
    v_cache: Annotated[Tensor, "Tensor(b!)"]
    k: Tensor | None
    v: Tensor | None
    cache_seqlens: Tensor
    block_table: Tensor | None
    key_mask: Tensor | None
    window_left: int
    window_right: int
    scale: float
    softcap: float
    sinks: Tensor | None
    k_scale: Annotated[Tensor | None, "Tensor(c!)?"]
    v_scale: Annotated[Tensor | None, "Tensor(d!)?"]
    num_splits: int
    return_lse: bool

    @property
    def new_tokens(self) -> int:
        """Tokens appended to each sequence."""
        new = self.k if self.k is not None else self.v
        return 0 if new is None else new.shape[1]

    @property
    def capacity(self) -> int:
        """The most tokens that a sequence of this cache can have."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k_cache.shape[1]


def largest_code(dtype: torch.dtype) -> float:
    """The code of a token's largest magnitude: symmetric, so int8 does not use -128."""
    return 127.0 if dtype is torch.int8 else torch.finfo(dtype).max


def copy_notes(call: KVCacheCall) -> list[str]:
    """Notes on copied arguments, for `explain`."""
    return strides.copy_notes(call, READ_ONLY)


def kernel_reason(call: KVCacheCall) -> str | None:
    """Why no kernel serves the call's queries or reads its caches in place; None when they can."""
    if call.q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it serves float32, bfloat16 and float16 queries, these are {call.q.dtype}"
    for name, cache in (("k_cache", call.k_cache), ("v_cache", call.v_cache)):
        if strides.needs_copy(cache):
            return (
                f"{name}'s last axis has stride {cache.stride(-1)}, not 1, and a cache is never "
                "copied"
            )
    return None

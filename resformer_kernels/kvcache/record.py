"""The record of a call of `attention_with_kvcache`: the op's schema is made from it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core import strides
from resformer_kernels._core.op import SymInt

ATTEND = "attention_with_kvcache"

QUANTISED = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
"""Dtypes of a cache with a scale per token and head: value = code * scale."""

READ_ONLY = ("q", "k", "v", "cache_seqlens", "cu_seqlens_q", "cu_seqlens_k_new")
"""Arguments that are copied where their last axis is not contiguous; caches never are."""


class KVCacheCall(NamedTuple):
    """A validated call, its fields in the order of the op's arguments.

    q is (B, Tq, Hq, Dk), or with `cu_seqlens_q` (1, total_q, Hq, Dk), of at most `max_seqlen_q`
    queries a sequence (0 otherwise); k and v likewise, with `cu_seqlens_k_new`. `block_table` None:
    caches (B, T, Hkv, D); else (pages, page_size, Hkv, D), V's in `v_block_table` where that is
    not None. `cache_seqlens` is int32 (B,) on q's device, the lengths before k and v are appended.
    `key_mask` is bool (B, T'), T' at most the capacity; keys from T' on are masked. `causal` is
    folded into window_right; -1 is unbounded on either side. `out`, of the result's shape, takes
    the result; the op's own then has no elements. `exclusive` and `out_gate` are those of an
    `AttentionCall`.
    """

    q: Tensor
    k_cache: Annotated[Tensor, "Tensor(a!)"]
    v_cache: Annotated[Tensor, "Tensor(b!)"]
    k: Tensor | None
    v: Tensor | None
    cache_seqlens: Tensor
    block_table: Tensor | None
    v_block_table: Tensor | None
    cu_seqlens_q: Tensor | None
    max_seqlen_q: SymInt
    cu_seqlens_k_new: Tensor | None
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
    out: Annotated[Tensor | None, "Tensor(e!)?"]
    exclusive: Tensor | None = None
    exclusive_value: float = 0.0
    exclusive_eps: float = 1e-6
    out_gate: Tensor | None = None

    @property
    def excludes(self) -> bool:
        """Whether the part along the query's own value is taken from the output."""
        return self.exclusive is not None or self.exclusive_value != 0.0

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.cache_seqlens.shape[0]

    @property
    def queries(self) -> int:
        """The most queries of a sequence."""
        return self.q.shape[1] if self.cu_seqlens_q is None else self.max_seqlen_q

    @property
    def new_rows(self) -> int:
        """The extent of k and v in time: of each sequence, or packed, of all."""
        new = self.k if self.k is not None else self.v
        return 0 if new is None else new.shape[1]

    @property
    def lengths(self) -> Tensor:
        """int32 (B,): tokens of each sequence after the append."""
        if self.cu_seqlens_k_new is None:
            return self.cache_seqlens + self.new_rows
        return self.cache_seqlens + self.cu_seqlens_k_new.diff()

    @property
    def value_table(self) -> Tensor | None:
        """The block table of V."""
        return self.block_table if self.v_block_table is None else self.v_block_table

    @property
    def capacity(self) -> int:
        """The most tokens that a sequence of this cache can have."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        if self.v_block_table is not None:
            pages = min(pages, self.v_block_table.shape[1])
        return pages * self.k_cache.shape[1]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the result."""
        return (*self.q.shape[:-1], self.v_cache.shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """The shape of the LSE: no elements where it is not asked for."""
        batch, time, heads, _ = self.q.shape
        return (batch, heads, time) if self.return_lse else (0,)


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

"""Checks of lengths, masks and page numbers, where they lie in host memory (or on a GPU under
RESFORMER_CHECK=1).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from resformer_kernels._core.checks import readable
from resformer_kernels.kvcache.record import KVCacheCall


def check_contents(call: KVCacheCall, given: Tensor | int) -> None:
    """ValueError where lengths (`given` as cache_seqlens), the mask or page numbers do not fit."""
    offsets = call.cu_seqlens_k_new
    if offsets is None or not readable(offsets):
        # Of offsets that cannot be read it is known that they add nothing or more.
        new = call.new_rows if offsets is None else 0
        added = [new] * (call.sequences if isinstance(given, Tensor) else min(call.sequences, 1))
    else:
        added = [b - a for a, b in pairwise(offsets.tolist())]
    if not isinstance(given, Tensor):
        lengths = [given] * len(added)
    elif readable(call.cache_seqlens):
        lengths = call.cache_seqlens.tolist()
    else:
        return
    for b, (length, new) in enumerate(zip(lengths, added, strict=True)):
        _check_length(call, b, length, new)
    for name, table, cache in (
        ("block_table", call.block_table, call.k_cache),
        ("v_block_table", call.v_block_table, call.v_cache),
    ):
        if table is not None and readable(table):
            _check_pages(name, table.cpu(), call.lengths.cpu(), cache)


def _check_length(call: KVCacheCall, b: int, length: int, new: int) -> None:
    if length < 0:
        raise ValueError(f"cache_seqlens must be 0 or more, got {length} at index {b}")
    if length + new > call.capacity:
        raise ValueError(
            f"the cache is full: sequence {b} has {length} tokens (cache_seqlens) and "
            f"{new} are appended, its capacity is {call.capacity}{_pages_of(call)}"
        )
    if call.key_mask is not None and length + new > call.key_mask.shape[1]:
        raise ValueError(
            f"key_mask must cover sequence {b}'s {length + new} tokens, "
            f"got {call.key_mask.shape[1]} columns"
        )


def _pages_of(call: KVCacheCall) -> str:
    if call.block_table is None:
        return ""
    pages = call.capacity // call.k_cache.shape[1]
    return f", the {pages} pages of its row of block_table"


def _check_pages(name: str, table: Tensor, ends: Tensor, cache: Tensor) -> None:
    pages, page_size = cache.shape[:2]
    used = torch.arange(table.shape[1]) * page_size < ends[:, None]
    wrong = (used & ((table < 0) | (table >= pages))).nonzero()
    if len(wrong):
        b, i = wrong[0].tolist()
        raise ValueError(
            f"{name} must name pages 0 to {pages - 1} for every token, "
            f"got {int(table[b, i])} for page {i} of sequence {b}"
        )

"""A call in the terms of the kernels: what several of its launches share."""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.arch import has_dependent_launches
from resformer_kernels._triton.launch import capability
from resformer_kernels._triton.views import NOTHING, View, view_of
from resformer_kernels.attention.triton.problem import Geometry, padded
from resformer_kernels.kvcache.record import KVCacheCall, largest_code
from resformer_kernels.kvcache.triton import codes
from resformer_kernels.kvcache.triton.places import Side, pool_of

_STORED = {
    torch.int8: codes.INT8,
    torch.float8_e4m3fn: codes.E4M3,
    torch.float8_e5m2: codes.E5M2,
}


class Problem:
    """Terms derived from a call."""

    def __init__(self, call: KVCacheCall) -> None:
        self.call = call
        self.sequences, self.queries = call.sequences, call.queries
        self.heads = call.k_cache.shape[2]
        self.group = call.q.shape[2] // self.heads
        self.rows = self.queries * self.group
        """The most rows of a KV head: the queries of its whole group."""
        self.packed = call.cu_seqlens_q is not None
        self.counts_in_append = call.new_rows > 0 and call.cu_seqlens_k_new is None
        """Whether the kernel that appends also sets the counters of splits to 0. Packed, a sequence
        may have no new token."""
        self.dependent = call.new_rows > 0 and has_dependent_launches(capability(call.q.device))
        """Whether attention is launched while tokens are appended, and waits on the GPU."""

    def sides(self, key_policy: str = "", value_policy: str = "") -> tuple[Side, Side]:
        """Keys and values, and the eviction policies of their loads."""
        call = self.call
        return (
            _side(call.k_cache, call.k_scale, call.block_table, key_policy),
            _side(call.v_cache, call.v_scale, call.value_table, value_policy),
        )

    def geometry(self) -> Geometry:
        """How sequences and heads lie in q and out, and which sides of the window are bounded."""
        call = self.call
        flags = (self.group, self.packed, call.window_left >= 0, call.window_right >= 0)
        offsets = call.cu_seqlens_q
        return Geometry(offsets, None, self.heads, *(tl.constexpr(flag) for flag in flags))

    def lengths(self) -> dict[str, Any]:
        """Arguments that say how many tokens a sequence has."""
        call = self.call
        return {
            "seqlens": call.cache_seqlens,
            "cu_new": call.cu_seqlens_k_new,
            "tokens": call.new_rows,
            "capacity": call.capacity,
        }


def _side(cache: Tensor, scale: Tensor | None, table: Tensor | None, policy: str) -> Side:
    stored = _STORED.get(cache.dtype, codes.PLAIN)
    # Float8 is read and written as its bits.
    bits = stored in (codes.E4M3, codes.E5M2)
    return Side(
        pool=pool_of(table, cache),
        codes=view_of(cache.view(torch.uint8) if bits else cache),
        scales=NOTHING if scale is None else View(scale, *scale.stride()),
        WIDTH=tl.constexpr(cache.shape[-1]),
        BLOCK=tl.constexpr(padded(cache.shape[-1])),
        STORED=stored,
        LARGEST=tl.constexpr(0.0 if scale is None else largest_code(cache.dtype)),
        POLICY=tl.constexpr(policy),
    )

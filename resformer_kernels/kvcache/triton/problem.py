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
from resformer_kernels.kvcache.triton.places import Side, matrix_of

_STORED = {
    torch.int8: codes.INT8,
    torch.float8_e4m3fn: codes.E4M3,
    torch.float8_e5m2: codes.E5M2,
}


class Problem:
    """Terms derived from a call."""

    def __init__(self, call: KVCacheCall) -> None:
        self.call = call
        self.sequences, self.queries, heads_q, _ = call.q.shape
        self.heads = call.k_cache.shape[2]
        self.group = heads_q // self.heads
        self.rows = self.queries * self.group
        """Rows of a KV head: the queries of its whole group."""
        self.table = matrix_of(call.block_table)
        self.dependent = call.new_tokens > 0 and has_dependent_launches(capability(call.q.device))
        """Whether attention is launched while tokens are appended, and waits on the GPU."""

    def sides(self, key_policy: str = "", value_policy: str = "") -> tuple[Side, Side]:
        """Keys and values, and the eviction policies of their loads."""
        call = self.call
        return (
            _side(call.k_cache, call.k_scale, key_policy),
            _side(call.v_cache, call.v_scale, value_policy),
        )

    def geometry(self) -> Geometry:
        """How sequences and heads lie in q and out, and which sides of the window are bounded."""
        call = self.call
        flags = (self.group, False, call.window_left >= 0, call.window_right >= 0)
        return Geometry(None, None, self.heads, *(tl.constexpr(flag) for flag in flags))

    def lengths(self) -> dict[str, Any]:
        """Arguments that place a key. Kernels do not specialise them, as they would a tuple's."""
        call = self.call
        return {
            "seqlens": call.cache_seqlens,
            "tokens": call.new_tokens,
            "capacity": call.capacity,
            "pages": call.k_cache.shape[0],
            "page_size": call.k_cache.shape[1],
        }


def _side(cache: Tensor, scale: Tensor | None, policy: str) -> Side:
    stored = _STORED.get(cache.dtype, codes.PLAIN)
    # Float8 is read and written as its bits.
    bits = stored in (codes.E4M3, codes.E5M2)
    return Side(
        codes=view_of(cache.view(torch.uint8) if bits else cache),
        scales=NOTHING if scale is None else View(scale, *scale.stride()),
        WIDTH=tl.constexpr(cache.shape[-1]),
        BLOCK=tl.constexpr(padded(cache.shape[-1])),
        STORED=stored,
        LARGEST=tl.constexpr(0.0 if scale is None else largest_code(cache.dtype)),
        POLICY=tl.constexpr(policy),
    )

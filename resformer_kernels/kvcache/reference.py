"""Attention over a cache in plain PyTorch: slow, obvious, and the definition of correct.

Appended tokens are written first, then attention runs over what the cache holds:

    length = cache_seqlens + new tokens,    cache[cache_seqlens : length] = new tokens
    out, LSE = softmax attention of q over cache[: length], masks aligned at the last query and key

A quantised cache holds codes and float32 scales, value = code * scale; a token is quantised as
scale = max|x| / largest code, code = x / scale rounded to nearest even, per token and head.

It computes in float64 for float64 queries and in float32 for all others.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from resformer_kernels._core.hardware import Hardware
from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.attention.reference import allowed_positions, attend, finish
from resformer_kernels.kvcache.packed import as_batch, rows_of
from resformer_kernels.kvcache.record import KVCacheCall, largest_code

NAME = "reference"

_LARGE = 2**24


def unsupported_reason(_call: KVCacheCall, _hardware: Hardware) -> str | None:
    """None: the reference serves everything."""
    return None


def is_large(call: KVCacheCall) -> bool:
    """Whether it materialises so many scores that a fallback deserves a warning."""
    queries = call.sequences * call.queries
    return queries * call.q.shape[2] * call.capacity >= _LARGE


def run(call: KVCacheCall) -> tuple[Tensor, Tensor | None]:
    """(out, lse or None); the caches have the new tokens in them."""
    kind = call.q.device.type
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
        where = (call.cache_seqlens, call.cu_seqlens_k_new)
        if call.k is not None:
            append(call.k_cache, call.k_scale, call.k, call.block_table, *where)
        if call.v is not None:
            append(call.v_cache, call.v_scale, call.v, call.value_table, *where)
        if call.cu_seqlens_q is None:
            out, lse = _attend(call)
        else:
            queries = as_batch(call)
            found = _attend(queries.call)
            out, lse = queries.unpack(*found)
        if call.out is not None:
            out = call.out.copy_(out)
        return out, lse if call.return_lse else None


def append(
    codes: Tensor,
    scale: Tensor | None,
    new: Tensor,
    table: Tensor | None,
    lengths: Tensor,
    cu_seqlens: Tensor | None = None,
) -> None:
    """Write `new` (B, Tnew, Hkv, D), or packed (1, total_new, Hkv, D), into a cache and its scales,
    after the `lengths` tokens of every sequence."""
    if 0 in (new.numel(), codes.numel(), lengths.numel(), 1 if table is None else table.numel()):
        return
    time = torch.arange(new.shape[1], device=new.device)
    exists = None
    if cu_seqlens is None:
        at = lengths[:, None] + time
        rows = torch.arange(new.shape[0], device=new.device)[:, None].expand_as(at)
    else:
        packed = rows_of(cu_seqlens, new.shape[1])
        # A row after the last sequence writes the last token again, or where there is none what
        # is there.
        pick = time.minimum(packed.lengths.sum() - 1).clamp(min=0)
        rows, new, exists = packed.sequence[pick], new[0, pick], packed.left[pick] >= 1
        at = torch.where(exists, lengths[rows] + packed.place[pick], 0)
    if table is not None:
        pages = table[rows, at // codes.shape[1]].long()
        # A sequence without tokens may have no page.
        rows = pages if exists is None else torch.where(exists, pages, 0)
        at = at % codes.shape[1]
    written = [(codes, new)] if scale is None else _quantised(codes, scale, new)
    for cache, x in written:
        if exists is not None:
            x = torch.where(exists.view(-1, *[1] * (x.dim() - 1)), x, cache[rows, at])
        cache[rows, at] = x


def _quantised(codes: Tensor, scale: Tensor, new: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(cache, what is written to it): codes, as their bits, and scales."""
    found, scales = quantise(new, codes.dtype)
    return [(codes.view(torch.int8), found.view(torch.int8)), (scale, scales)]


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes of `dtype` in x's shape, float32 scales (..., heads)) of x (..., heads, D).

    x = code * scale up to half a code; a token of zeros has the scale 0. A token that holds a NaN
    or an infinity has such a scale too, and comes back as NaN.
    """
    wide = x.float()
    most = wide.abs().amax(-1)
    largest = largest_code(dtype)
    # A quotient, rounded once: a number over a tensor is its reciprocal times the number.
    inverse = torch.where(most > 0, torch.full_like(most, largest) / most, 0.0)
    codes = (wide * inverse[..., None]).nan_to_num(nan=0.0)
    if dtype is torch.int8:
        codes = codes.round()
    return codes.clamp(-largest, largest).to(dtype), most / largest


def dequantise(codes: Tensor, scales: Tensor, compute: torch.dtype) -> Tensor:
    """codes (..., heads, D) times scales (..., heads)."""
    return codes.to(compute) * scales.to(compute)[..., None]


def held(
    cache: Tensor, scale: Tensor | None, table: Tensor | None, seen: Tensor, wide: torch.dtype
) -> Tensor:
    """The cache as (B, capacity, Hkv, D), dequantised to `wide`; zeros outside of `seen` (B,
    capacity)."""
    rows = [cache] if scale is None else [cache, scale]
    if table is not None:
        # Entries of the table past a sequence's end may hold anything.
        pages = table.clamp(0, max(cache.shape[0] - 1, 0)).long()
        rows = [x[pages].flatten(1, 2)[:, : seen.shape[1]] for x in rows]
    codes, *scales = rows
    if scales:
        codes = dequantise(codes, scales[0], wide)
    # Memory past the end may hold NaN, and zero times NaN is NaN.
    return codes.masked_fill(~seen[:, :, None, None], 0)


def _attend(call: KVCacheCall) -> tuple[Tensor, Tensor]:
    capacity, lengths = call.capacity, call.lengths
    seen = torch.arange(capacity, device=call.q.device) < lengths[:, None]
    if call.key_mask is not None:
        rest = call.key_mask.new_zeros(seen.shape[0], capacity - call.key_mask.shape[1])
        seen = seen & torch.cat([call.key_mask, rest], dim=1)
    wide = torch.float64 if call.q.dtype is torch.float64 else torch.float32
    k = held(call.k_cache, call.k_scale, call.block_table, seen, wide)
    v = held(call.v_cache, call.v_scale, call.value_table, seen, wide)
    options = AttentionCall(
        q=call.q,
        k=k,
        v=v,
        v_first=None,
        lambda_v=None,
        lambda_first=None,
        lambda_v_value=1.0,
        lambda_first_value=1.0,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=call.q.shape[1],
        max_seqlen_k=capacity,
        window_left=call.window_left,
        window_right=call.window_right,
        scale=call.scale,
        softcap=call.softcap,
        sinks=call.sinks,
        attn_bias=None,
        return_lse=call.return_lse,
        return_mixed_value=False,
        exclusive=call.exclusive,
        exclusive_value=call.exclusive_value,
        exclusive_eps=call.exclusive_eps,
        out_gate=call.out_gate,
    )
    placed = allowed_positions(
        options, call.q.shape[1], lengths[:, None, None, None], call.q.device
    )
    y, lse = attend(options, call.q, k, v, placed & seen[:, None, None, :])
    at = torch.arange(call.q.shape[1], device=y.device) + (lengths[:, None] - call.q.shape[1])
    return finish(options, y, v, at), lse

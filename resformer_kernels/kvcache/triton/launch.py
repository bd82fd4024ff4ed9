"""`attention_with_kvcache` on Triton: outputs and scratch, the cut of the work, launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._triton import device as lib
from resformer_kernels._triton.views import NOTHING, View, view_of
from resformer_kernels.attention.triton.problem import FAR, lse_view, padded, score_scale
from resformer_kernels.kvcache.record import KVCacheCall, largest_code
from resformer_kernels.kvcache.triton import attend as kernels
from resformer_kernels.kvcache.triton import codes, plan

_STORED = {
    torch.int8: codes.INT8.value,
    torch.float8_e4m3fn: codes.E4M3.value,
    torch.float8_e5m2: codes.E5M2.value,
}
# Of a program that appends: heads times channels.
_ELEMENTS = 2048


class Table(NamedTuple):
    """block_table by strides in elements; without a pointer the cache is contiguous."""

    pointer: Tensor | None
    sequence: int
    page: int


class Mask(NamedTuple):
    """key_mask by strides in elements, one byte a key."""

    pointer: Tensor | None
    sequence: int
    key: int


class Cache(NamedTuple):
    """What a call reads keys and values from."""

    k: View
    v: View
    k_scale: View
    v_scale: View
    table: Table
    mask: Mask


class _Problem:
    """A call in the terms of the kernels: what several of its launches share."""

    def __init__(self, call: KVCacheCall) -> None:
        self.call = call
        self.stored = _STORED.get(call.k_cache.dtype, codes.PLAIN.value)
        self.k_cache, self.v_cache = (self._cache(x) for x in (call.k_cache, call.v_cache))
        self.k_scale, self.v_scale = (self._scale(x) for x in (call.k_scale, call.v_scale))
        self.table = Table(None, 0, 0)
        if call.block_table is not None:
            self.table = Table(call.block_table, *call.block_table.stride())
        self.sequences, self.queries, heads_q, self.dim_k = call.q.shape
        self.heads, self.dim_v = call.k_cache.shape[2], call.v_cache.shape[-1]
        self.group = heads_q // self.heads
        self.rows = self.queries * self.group

    def _cache(self, cache: Tensor) -> View:
        # Float8 is read and written as its bits.
        floats = self.stored in (codes.E4M3.value, codes.E5M2.value)
        return view_of(cache.view(torch.uint8) if floats else cache)

    def _scale(self, scale: Tensor | None) -> View:
        return NOTHING if scale is None else View(scale, *scale.stride())

    def places(self) -> dict[str, Any]:
        """The arguments that say where a key lies."""
        call = self.call
        return {
            "seqlens": call.cache_seqlens,
            "tokens": call.new_tokens,
            "capacity": call.capacity,
            "pages": call.k_cache.shape[0],
            "page_size": call.k_cache.shape[1],
            "heads": self.heads,
            "DIM_K": self.dim_k,
            "DIM_V": self.dim_v,
            "BLOCK_K": padded(self.dim_k),
            "BLOCK_V": padded(self.dim_v),
            "STORED": self.stored,
        }


def attend(call: KVCacheCall) -> tuple[Tensor, Tensor]:
    """The implementation of the op."""
    p = _Problem(call)
    out = lib.empty(call.q, (*call.q.shape[:-1], p.dim_v))
    lse = None
    if call.return_lse:
        shape = (p.sequences, call.q.shape[2], p.queries)
        lse = lib.empty(call.q, shape, torch.float32)
    _append(p)
    _attend(p, out, lse)
    return out, call.q.new_empty((0,), dtype=torch.float32) if lse is None else lse


def _append(p: _Problem) -> None:
    call = p.call
    if call.new_tokens == 0:
        return
    places = p.places()
    widest = max(places["BLOCK_K"], places["BLOCK_V"])
    at_once = min(1 << (p.heads - 1).bit_length(), max(1, _ELEMENTS // widest))
    head_tiles = -(-p.heads // at_once)
    lib.launch(
        codes.append_kernel,
        (p.sequences * call.new_tokens * head_tiles,),
        call.q.device,
        k_cache=p.k_cache,
        v_cache=p.v_cache,
        k_scale=p.k_scale,
        v_scale=p.v_scale,
        k=view_of(call.k),
        v=view_of(call.v),
        table=p.table,
        head_tiles=head_tiles,
        HEADS=at_once,
        LARGEST=largest_code(call.k_cache.dtype) if p.stored != codes.PLAIN.value else 0.0,
        num_warps=4 if at_once * widest >= 1024 else 1,
        **places,
    )


def _span(p: _Problem) -> tuple[Mask, Tensor | None]:
    """key_mask as kernels take it, and where each sequence's first and last open key lie."""
    mask = p.call.key_mask
    if mask is None:
        return Mask(None, 0, 0), None
    seen = Mask(mask.view(torch.uint8), *mask.stride())
    span = p.call.q.new_empty((p.sequences, 2), dtype=torch.int32)
    lib.launch(
        kernels.mask_span_kernel,
        (p.sequences,),
        mask.device,
        mask=seen,
        span=span,
        columns=mask.shape[1],
        BLOCK=4096,
        num_warps=4,
    )
    return seen, span


def _attend(p: _Problem, out: Tensor, lse: Tensor | None) -> None:
    call = p.call
    places = p.places()
    tiles = plan.choose_tiles(
        p.rows, places["BLOCK_K"], places["BLOCK_V"], call.q.dtype, call.k_cache.dtype
    )
    row_tiles = -(-p.rows // tiles.rows)
    programs = p.sequences * p.heads * row_tiles
    splits, least = call.num_splits, 1
    if splits == 0:
        reach = plan.keys_in_reach(call.capacity, p.queries, call.window_left)
        processors = plan.processors(call.q.device)
        splits = plan.choose_splits(programs, -(-reach // tiles.keys), processors)
        least = plan.LEAST_BLOCKS if splits > 1 else 1
    sums = peaks = totals = None
    if splits > 1:
        slots = (p.sequences, p.heads, p.rows, splits)
        sums = lib.empty(call.q, (*slots, p.dim_v), torch.float32)
        peaks, totals = (lib.empty(call.q, slots, torch.float32) for _ in range(2))
    precise = call.q.dtype is torch.float32
    alpha, raw = score_scale(call.scale, call.softcap, biased=False, precise=precise)
    key_mask, span = _span(p)
    views = {"out": view_of(out), "lse": NOTHING if lse is None else lse_view(lse)}
    lib.launch(
        kernels.attend_kernel,
        (programs * splits,),
        call.q.device,
        q=view_of(call.q),
        cache=Cache(p.k_cache, p.v_cache, p.k_scale, p.v_scale, p.table, key_mask),
        span=span,
        sinks=call.sinks if splits == 1 else None,
        sums=sums,
        peaks=peaks,
        totals=totals,
        q_len=p.queries,
        mask_columns=0 if call.key_mask is None else call.key_mask.shape[1],
        row_tiles=row_tiles,
        splits=splits,
        least=least,
        window_left=min(call.window_left, FAR),
        window_right=min(call.window_right, FAR),
        alpha=alpha,
        softcap=call.softcap,
        ROWS=tiles.rows,
        KEYS=tiles.keys,
        GROUP=p.group,
        HAS_LEFT=call.window_left >= 0,
        HAS_RIGHT=call.window_right >= 0,
        CAPPED=call.softcap > 0,
        RAW=raw,
        PRECISE=precise,
        WHOLE_PAGES=call.block_table is not None and call.k_cache.shape[1] % tiles.keys == 0,
        SPLIT=splits > 1,
        AHEAD=tiles.ahead,
        # Few rows are one tile: its keys are read once and for all, values serve other layers.
        KEY_POLICY="evict_first" if tiles.ahead else "",
        VALUE_POLICY="evict_last" if tiles.ahead else "",
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        **views,
        **places,
    )
    if splits > 1:
        _merge(p, views, sums, peaks, totals, splits, precise)


def _merge(
    p: _Problem,
    views: dict[str, View],
    sums: Tensor | None,
    peaks: Tensor | None,
    totals: Tensor | None,
    splits: int,
    precise: bool,
) -> None:
    block = padded(p.dim_v)
    lib.launch(
        kernels.merge_kernel,
        (p.sequences * p.heads * p.rows,),
        p.call.q.device,
        sums=sums,
        peaks=peaks,
        totals=totals,
        sinks=p.call.sinks,
        count=p.rows,
        heads=p.heads,
        splits=splits,
        DIM_V=p.dim_v,
        BLOCK_V=block,
        GROUP=p.group,
        SPLITS=1 << (splits - 1).bit_length(),
        AT_ONCE=min(16, 1 << (splits - 1).bit_length()),
        PRECISE=precise,
        num_warps=4,
        **views,
    )

"""Attention over a cache on a GPU: flash-decoding, and the order of a call's launches.

A tile's rows are the queries of all heads that share a KV head, as in `attention/triton/tiles.py`,
whose scores and softmax these kernels use. The keys of a tile of rows are partitioned into splits
of whole tiles (split-KV); a split leaves its sums unnormalised, with their peak, for the merge.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.device import dot, round_to, wait_for_last
from resformer_kernels._triton.launch import empty, launch, multiprocessors
from resformer_kernels._triton.specialise import Stride, Unit
from resformer_kernels._triton.views import view_of
from resformer_kernels.attention.triton.forward import clear_tail
from resformer_kernels.attention.triton.loads import Source, load_row_tile
from resformer_kernels.attention.triton.problem import FAR, lse_view, padded, scoring
from resformer_kernels.attention.triton.softmax import Seen, scores, softmax_step
from resformer_kernels.attention.triton.tiles import Limits, key_bounds, key_tiles, place
from resformer_kernels.kvcache.record import KVCacheCall
from resformer_kernels.kvcache.triton import plan
from resformer_kernels.kvcache.triton.append import append
from resformer_kernels.kvcache.triton.codes import PLAIN, decoded
from resformer_kernels.kvcache.triton.epilogue import epilogue_of
from resformer_kernels.kvcache.triton.places import (
    Cache,
    Place,
    is_open,
    load_codes,
    load_scales,
    matrix_of,
    place_of,
)
from resformer_kernels.kvcache.triton.problem import Problem
from resformer_kernels.kvcache.triton.result import (
    Partials,
    Result,
    finish_split,
    merge,
    store_result,
    store_split,
)

# Beyond every key that a row may see.
_NOWHERE: tl.constexpr = tl.constexpr(2147483647)


class Tile(NamedTuple):
    """The tiles of a launch; all members are constants."""

    ROWS: Any
    KEYS: Any
    WHOLE_PAGES: Any
    """Whether a page holds whole tiles of keys."""
    AHEAD: Any
    """Whether the next tile is loaded into registers while this one is computed."""


class Walk(NamedTuple):
    """The keys of a program: those of one sequence and KV head, up to tile `stop`."""

    sequence: Any
    head: Any
    k_len: Any
    stop: Any


class Mask(NamedTuple):
    """key_mask, one byte per key."""

    pointer: Tensor
    row: Stride
    column: Unit


@triton.jit
def mask_span_kernel(mask, span, columns, BLOCK: tl.constexpr):
    """The first open key of a sequence's key_mask, and one past the last."""
    sequence = tl.program_id(0)
    row = mask.pointer + tl.cast(sequence, tl.int64) * mask.row
    first = tl.full([BLOCK], _NOWHERE, tl.int32)
    last = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, columns, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        at = row + keys.to(tl.int64) * mask.column
        seen = tl.load(at, mask=keys < columns, other=0) != 0
        first = tl.minimum(first, tl.where(seen, keys, _NOWHERE))
        last = tl.maximum(last, tl.where(seen, keys + 1, 0))
    tl.store(span + 2 * sequence, tl.min(first, 0))
    tl.store(span + 2 * sequence + 1, tl.max(last, 0))


def _mask_span(mask: Tensor | None) -> Tensor | None:
    """The span of open keys, (sequences, 2)."""
    if mask is None:
        return None
    span = empty(mask, (mask.shape[0], 2), torch.int32)
    launch(
        mask_span_kernel,
        (mask.shape[0],),
        mask.device,
        mask=Mask(mask.view(torch.uint8), *mask.stride()),
        span=span,
        columns=mask.shape[1],
        BLOCK=4096,
        num_warps=4,
    )
    return span


@triton.jit
def _place(pool, walk, step, keys, inside, tile):
    """The place of the keys of tile `step`."""
    if tile.WHOLE_PAGES:
        page = place_of(pool, walk.sequence, step * tile.KEYS, step < walk.stop)
        place = Place(page.row, keys % pool.page_size, inside & page.inside)
    else:
        place = place_of(pool, walk.sequence, keys, inside)
    return place


@triton.jit
def _load_step(cache, walk, step, tile):
    """(keys, K, V, K's scales, V's) of tile `step`, which is empty from `stop` on.

    Masked keys are moved beyond all others and not read.
    """
    keys = step * tile.KEYS + tl.arange(0, tile.KEYS)
    inside = keys < tl.minimum(walk.k_len, walk.stop * tile.KEYS)
    place = _place(cache.k.pool, walk, step, keys, inside, tile)
    place = Place(place.row, place.token, is_open(cache.mask, walk.sequence, keys, place.inside))
    shown = tl.where(place.inside, keys, _NOWHERE)
    k_codes = load_codes(cache.k, walk.head, place)
    k_scale = load_scales(cache.k, walk.head, place)
    if cache.OWN:
        place = _place(cache.v.pool, walk, step, keys, place.inside, tile)
    v_codes = load_codes(cache.v, walk.head, place)
    return shown, k_codes, v_codes, k_scale, load_scales(cache.v, walk.head, place)


@triton.jit
def attend_kernel(
    q,
    cache,
    seqlens,
    cu_new,
    span,
    partials,
    result,
    epilogue,
    scoring,
    geometry,
    tile,
    q_len,
    tokens,
    capacity,
    row_tiles,
    splits,
    least,
    window_left,
    window_right,
    DEPENDENT: tl.constexpr,
):
    """One split of the keys of one tile of rows of one sequence and KV head.

    Without splits it writes the result, else its part of `partials`, and the result if all splits
    have by then. `least` is the fewest tiles of keys that a split has.

    AHEAD: copies to shared memory, which the compiler makes of other loads, cannot carry an
    eviction policy; a tile loaded into registers ahead of its use can.
    """
    wait_for_last(DEPENDENT)
    ROWS: tl.constexpr = tile.ROWS
    KEYS: tl.constexpr = tile.KEYS
    STORED: tl.constexpr = cache.k.STORED
    program = tl.program_id(0)
    first_row = program % row_tiles * ROWS
    split = program // row_tiles % splits
    sequence_head = program // row_tiles // splits
    head = sequence_head % geometry.heads
    sequence = sequence_head // geometry.heads
    if cu_new is not None:
        tokens = tl.load(cu_new + sequence + 1) - tl.load(cu_new + sequence)
    # A length out of range must not lead outside of the cache.
    k_len = tl.minimum(tl.maximum(tl.load(seqlens + sequence) + tokens, 0), capacity)
    at = place(geometry, Limits(q_len, k_len, window_left, window_right), sequence, head)
    # Of packed sequences others may have more rows.
    if geometry.PACKED and first_row >= at.count:
        return
    rows = first_row + tl.arange(0, ROWS)
    # (ROWS, BLOCK)
    q_tile = load_row_tile(
        Source(q, None, geometry, cache.k.WIDTH, cache.k.BLOCK), at, first_row, ROWS, True
    )
    lo, hi = key_bounds(rows, at, geometry)
    seen = Seen(lo[:, None], hi[:, None], 0, 0)
    last_row = tl.minimum(first_row + ROWS, at.count) - 1
    spans = key_tiles(first_row, last_row, at, geometry, KEYS)
    begin = spans.begin
    end = spans.end
    if span is not None:
        begin = tl.maximum(begin, tl.load(span + 2 * sequence) // KEYS)
        end = tl.minimum(end, tl.cdiv(tl.load(span + 2 * sequence + 1), KEYS))
    share = tl.maximum(tl.cdiv(tl.maximum(end - begin, 0), splits), least)
    # `begin` of a sequence that is masked altogether lies beyond `end`.
    start = tl.minimum(begin + split * share, end)
    stop = tl.minimum(start + share, end)

    walk = Walk(sequence, head, k_len, stop)
    acc = tl.zeros([ROWS, result.BLOCK], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if tile.AHEAD:
        shown, k_codes, v_codes, k_scale, v_scale = _load_step(cache, walk, start, tile)
    for step in tl.range(start, stop):
        following = _load_step(cache, walk, step + 1 if tile.AHEAD else step, tile)
        if not tile.AHEAD:
            shown, k_codes, v_codes, k_scale, v_scale = following
        # (KEYS, BLOCK)
        k_tile = decoded(k_codes, q_tile.dtype, STORED)
        # (ROWS, KEYS)
        product = dot(q_tile, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32))
        if STORED != PLAIN:
            product = product * k_scale[None, :]
        x, _slope = scores(product, shown[None, :], seen, scoring, True)
        p, peak, total, acc = softmax_step(x, peak, total, acc, scoring)
        # (KEYS, BLOCK)
        v_tile = decoded(v_codes, q_tile.dtype, STORED)
        if STORED == PLAIN:
            acc = dot(round_to(p, v_tile.dtype), v_tile, acc)
        else:
            # Relative to the tile's largest scale, probabilities stay within their dtype's range.
            largest = tl.max(tl.abs(v_scale), 0)
            largest = tl.where(largest == 0.0, 1.0, largest)
            weighted = round_to(p * (v_scale / largest)[None, :], v_tile.dtype)
            acc += dot(weighted, v_tile, tl.zeros([ROWS, result.BLOCK], tl.float32)) * largest
        if tile.AHEAD:
            shown, k_codes, v_codes, k_scale, v_scale = following

    if partials.sums is not None:
        rows_before = at.q_start * geometry.GROUP
        if not geometry.PACKED:
            rows_before = sequence * at.count
        first_slot = tl.cast(rows_before * geometry.heads + head * at.count, tl.int64) * splits
        slots = first_slot + rows.to(tl.int64) * splits + split
        softmax = (peak, total, acc)
        if start < stop:
            store_split(partials, slots, rows < at.count, softmax, result.WIDTH)
        counter = partials.counters + sequence_head * row_tiles + program % row_tiles
        if finish_split(counter, splits):
            # The splits that have keys are the first ones.
            used = tl.cdiv(tl.maximum(end - begin, 0), share)
            merge(
                partials, result, epilogue, cache, geometry, at, first_row, last_row + 1,
                first_slot, splits, used,
            )  # fmt: skip
    else:
        store_result(result, epilogue, cache, geometry, at, rows, (peak, total, acc))


def attend(call: KVCacheCall) -> tuple[Tensor, Tensor]:
    """The implementation of the op: append, then attention, and the merge of its splits."""
    p = Problem(call)
    direct = call.out is not None and (not p.packed or call.out.is_contiguous())
    out = call.out if direct else empty(call.q, call.out_shape)
    assert out is not None
    # Packed rows that belong to no sequence see nothing.
    lse = empty(call.q, call.lse_shape, torch.float32)
    if p.packed:
        lse.fill_(-torch.inf)
    blocks = (padded(call.q.shape[-1]), padded(call.v_cache.shape[-1]))
    tiles = plan.choose_tiles(p.rows, *blocks, call.q.dtype, call.k_cache.dtype)
    splits = _splits(p, tiles)
    partials = _partials(p, tiles, splits)
    append(p, partials.counters if p.counts_in_append else None)
    _attend(p, tiles, splits, partials, (out, lse))
    if p.packed:
        clear_tail(call.cu_seqlens_q, out[0])
    if call.out is None:
        return out, lse
    if not direct:
        call.out.copy_(out)
    return call.q.new_empty((0,)), lse


def _splits(p: Problem, tiles: plan.Tiles) -> int:
    """Number of splits of the keys."""
    call = p.call
    if call.num_splits:
        return call.num_splits
    reach = plan.keys_in_reach(call.capacity, p.queries, call.window_left)
    slots = multiprocessors(call.q.device) * tiles.resident
    programs = p.sequences * p.heads * -(-p.rows // tiles.rows)
    return plan.choose_splits(programs, -(-reach // tiles.keys), slots)


def _partials(p: Problem, tiles: plan.Tiles, splits: int) -> Partials:
    """Memory of the splits; its counters are set to 0 here, or by `append`."""
    if splits == 1:
        return Partials(None, None, None, None)
    call = p.call
    slots = (call.q.shape[0], p.heads, call.q.shape[1] * p.group, splits)
    shapes = ((*slots, call.v_cache.shape[-1]), slots, slots)
    sums, peaks, totals = (empty(call.q, shape, torch.float32) for shape in shapes)
    counts = (p.sequences, p.heads, -(-p.rows // tiles.rows))
    counters = (
        empty(call.q, counts, torch.int32)
        if p.counts_in_append
        else call.q.new_zeros(counts, dtype=torch.int32)
    )
    return Partials(sums, peaks, totals, counters)


def _attend(
    p: Problem, tiles: plan.Tiles, splits: int, partials: Partials, results: tuple[Tensor, Tensor]
) -> None:
    """Attention, whose results are (out, LSE)."""
    out, lse = results
    call = p.call
    # A single tile of rows reads keys once. Values are read again where a layer shares them with
    # others, as one that appends keys alone does.
    shared = call.k is not None and call.v is None
    policies = ("evict_first", "evict_last" if shared else "")
    keys, values = p.sides(*(policies if tiles.ahead else ("", "")))
    row_tiles = -(-p.rows // tiles.rows)
    epilogue = epilogue_of(call)
    result = Result(
        out=view_of(out),
        lse=lse_view(lse if call.return_lse else None),
        sinks=call.sinks,
        WIDTH=values.WIDTH,
        BLOCK=values.BLOCK,
        PRECISE=tl.constexpr(call.q.dtype is torch.float32),
        FINISHES=tl.constexpr(epilogue is not None),
    )
    whole_pages = call.block_table is not None and call.k_cache.shape[1] % tiles.keys == 0
    launch(
        attend_kernel,
        (p.sequences * p.heads * row_tiles * splits,),
        call.q.device,
        q=view_of(call.q),
        cache=Cache(
            keys, values, matrix_of(call.key_mask), tl.constexpr(call.v_block_table is not None)
        ),
        span=_mask_span(call.key_mask),
        partials=partials,
        result=result,
        epilogue=epilogue,
        scoring=scoring(call),
        geometry=p.geometry(),
        tile=Tile(*map(tl.constexpr, (tiles.rows, tiles.keys, whole_pages, tiles.ahead))),
        q_len=p.queries,
        row_tiles=row_tiles,
        splits=splits,
        least=1 if call.num_splits or splits == 1 else plan.LEAST_BLOCKS,
        window_left=min(call.window_left, FAR),
        window_right=min(call.window_right, FAR),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        maxnreg=tiles.registers,
        DEPENDENT=p.dependent,
        launch_pdl=p.dependent,
        **p.lengths(),
    )

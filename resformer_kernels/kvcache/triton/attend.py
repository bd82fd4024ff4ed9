"""Attention over a cache on a GPU: flash-decoding, and the merge of its splits.

A tile's rows are the queries of all heads that share a KV head, as in `attention/triton_tiles.py`,
whose scores and softmax these kernels use. The keys of a tile of rows are cut into splits of whole
tiles; a split leaves its sums unnormalised, with their peak, for `merge_kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels._triton.device import dot, round_to
from resformer_kernels.attention.triton.loads import at_head, load_row_tile, row_pointers
from resformer_kernels.attention.triton.tiles import (
    NO_BIAS,
    close_rows,
    key_bounds,
    key_tiles,
    probabilities,
    scores,
    softmax_step,
)
from resformer_kernels.kvcache.triton.codes import PLAIN, decoded, page_of

# Beyond every key that a row may see.
_NOWHERE: tl.constexpr = tl.constexpr(2147483647)


@triton.jit(do_not_specialize=["columns"])
def mask_span_kernel(mask, span, columns, BLOCK: tl.constexpr):
    """Of a sequence's key_mask: the first key that may be attended to, and one past the last."""
    sequence = tl.program_id(0)
    row = mask.pointer + tl.cast(sequence, tl.int64) * mask.sequence
    first = tl.full([BLOCK], _NOWHERE, tl.int32)
    last = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, columns, BLOCK):
        keys = start + tl.arange(0, BLOCK)
        at = row + keys.to(tl.int64) * mask.key
        seen = tl.load(at, mask=keys < columns, other=0) != 0
        first = tl.minimum(first, tl.where(seen, keys, _NOWHERE))
        last = tl.maximum(last, tl.where(seen, keys + 1, 0))
    tl.store(span + 2 * sequence, tl.min(first, 0))
    tl.store(span + 2 * sequence + 1, tl.max(last, 0))


@triton.jit
def _load_cached(
    cache,
    head,
    pages,
    places,
    inside,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    POLICY: tl.constexpr,
):
    """The keys (or values) of one head at `places` of `pages`; zeros where not inside."""
    columns = tl.arange(0, BLOCK)
    rows = pages.to(tl.int64) * cache.batch + places.to(tl.int64) * cache.time
    base = cache.pointer + tl.cast(head, tl.int64) * cache.head
    at = base + rows[:, None] + columns[None, :]
    mask = inside[:, None]
    if WIDTH != BLOCK:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(at, mask=mask, other=0, eviction_policy=POLICY)


@triton.jit
def _load_scales(scale, head, pages, places, inside):
    """The scales of what `_load_cached` loads; zeros where not inside."""
    at = pages.to(tl.int64) * scale.batch + places.to(tl.int64) * scale.time
    base = scale.pointer + tl.cast(head, tl.int64) * scale.head
    return tl.load(base + at, mask=inside, other=0.0)


@triton.jit
def _load_step(
    cache,
    sequence,
    head,
    step,
    stop,
    k_len,
    pages,
    page_size,
    mask_columns,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEYS: tl.constexpr,
    STORED: tl.constexpr,
    WHOLE_PAGES: tl.constexpr,
    KEY_POLICY: tl.constexpr,
    VALUE_POLICY: tl.constexpr,
):
    """(keys, K, V, K's scales, V's) of tile `step`, which is empty from `stop` on.

    Keys that nobody may see are moved beyond all others; what lies there is not read.
    """
    keys = step * KEYS + tl.arange(0, KEYS)
    inside = keys < tl.minimum(k_len, stop * KEYS)
    if cache.table.pointer is None:
        page = sequence
        place = keys
    elif WHOLE_PAGES:
        page, _place, there = page_of(
            cache.table, sequence, step * KEYS, step < stop, pages, page_size
        )
        inside = inside & there
        place = keys % page_size
    else:
        page, place, inside = page_of(cache.table, sequence, keys, inside, pages, page_size)
    if cache.mask.pointer is not None:
        at = tl.cast(sequence, tl.int64) * cache.mask.sequence + keys.to(tl.int64) * cache.mask.key
        known = inside & (keys < mask_columns)
        inside = known & (tl.load(cache.mask.pointer + at, mask=known, other=0) != 0)
    shown = tl.where(inside, keys, _NOWHERE)
    k_tile = _load_cached(cache.k, head, page, place, inside, DIM_K, BLOCK_K, KEY_POLICY)
    v_tile = _load_cached(cache.v, head, page, place, inside, DIM_V, BLOCK_V, VALUE_POLICY)
    if STORED == PLAIN:
        k_scale = shown
        v_scale = shown
    else:
        k_scale = _load_scales(cache.k_scale, head, page, place, inside)
        v_scale = _load_scales(cache.v_scale, head, page, place, inside)
    return shown, k_tile, v_tile, k_scale, v_scale


@triton.jit(
    do_not_specialize=[
        "q_len", "tokens", "capacity", "mask_columns", "pages", "page_size", "row_tiles", "splits",
        "least", "window_left", "window_right",
    ]
)  # fmt: skip
def attend_kernel(
    q,
    cache,
    seqlens,
    span,
    sinks,
    out,
    lse,
    sums,
    peaks,
    totals,
    q_len,
    tokens,
    capacity,
    mask_columns,
    pages,
    page_size,
    heads,
    row_tiles,
    splits,
    least,
    window_left,
    window_right,
    alpha,
    softcap,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
    RAW: tl.constexpr,
    PRECISE: tl.constexpr,
    STORED: tl.constexpr,
    WHOLE_PAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
    KEY_POLICY: tl.constexpr,
    VALUE_POLICY: tl.constexpr,
):
    """One split of the keys of one tile of rows of one sequence and KV head.

    Not SPLIT: `out` and, unless it is None, `lse`. Else sums (sequences, heads, rows, splits,
    DIM_V), peaks and totals (without the last axis); where a split has no keys its total is 0 and
    its sums are not written. `least` is the fewest tiles of keys that a split has.

    AHEAD: the next tile is loaded into registers while this one is computed. Copies to shared
    memory, which the compiler makes of other loads, cannot say how long a cache is to keep them.
    """
    program = tl.program_id(0)
    tile = program % row_tiles
    split = program // row_tiles % splits
    sequence_head = program // row_tiles // splits
    head = sequence_head % heads
    sequence = sequence_head // heads
    # Lengths that cannot be lead nowhere outside of the cache.
    k_len = tl.minimum(tl.maximum(tl.load(seqlens + sequence) + tokens, 0), capacity)
    count = q_len * GROUP
    rows = tile * ROWS + tl.arange(0, ROWS)
    q_tile = load_row_tile(
        q, None, sequence, 0, tile * ROWS, head, count, DIM_K, BLOCK_K, ROWS, GROUP, True, False
    )
    shift = k_len - q_len
    lo, hi = key_bounds(
        rows, count, shift, k_len, window_left, window_right, GROUP, HAS_LEFT, HAS_RIGHT
    )
    begin, _inner_begin, _inner_end, end = key_tiles(
        tile * ROWS, tl.minimum(tile * ROWS + ROWS, count) - 1, shift, k_len, window_left,
        window_right, GROUP, KEYS, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    if span is not None:
        begin = tl.maximum(begin, tl.load(span + 2 * sequence) // KEYS)
        end = tl.minimum(end, tl.cdiv(tl.load(span + 2 * sequence + 1), KEYS))
    share = tl.maximum(tl.cdiv(tl.maximum(end - begin, 0), splits), least)
    # A sequence that is masked altogether begins nowhere.
    start = tl.minimum(begin + split * share, end)
    stop = tl.minimum(start + share, end)

    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if AHEAD:
        shown, k_codes, v_codes, k_scale, v_scale = _load_step(
            cache, sequence, head, start, stop, k_len, pages, page_size, mask_columns, DIM_K,
            DIM_V, BLOCK_K, BLOCK_V, KEYS, STORED, WHOLE_PAGES, KEY_POLICY, VALUE_POLICY,
        )  # fmt: skip
    for step in tl.range(start, stop):
        following = _load_step(
            cache, sequence, head, step + 1 if AHEAD else step, stop, k_len, pages, page_size,
            mask_columns, DIM_K, DIM_V, BLOCK_K, BLOCK_V, KEYS, STORED, WHOLE_PAGES, KEY_POLICY,
            VALUE_POLICY,
        )  # fmt: skip
        if not AHEAD:
            shown, k_codes, v_codes, k_scale, v_scale = following
        k_tile = decoded(k_codes, q_tile.dtype, STORED)
        product = dot(q_tile, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32))
        if STORED != PLAIN:
            product = product * k_scale[None, :]
        x, _slope = scores(
            product, shown[None, :], lo[:, None], hi[:, None], None, 0, 0, alpha, softcap, True,
            HAS_LEFT, CAPPED, NO_BIAS, RAW, PRECISE, tl.int32,
        )  # fmt: skip
        p, peak, total, acc = softmax_step(x, peak, total, acc, alpha, RAW, PRECISE)
        v_tile = decoded(v_codes, q_tile.dtype, STORED)
        if STORED == PLAIN:
            acc = dot(round_to(p, v_tile.dtype), v_tile, acc)
        else:
            # Relative to the largest scale of the tile, probabilities keep to their dtype's range.
            largest = tl.max(tl.abs(v_scale), 0)
            largest = tl.where(largest == 0.0, 1.0, largest)
            weighted = round_to(p * (v_scale / largest)[None, :], v_tile.dtype)
            acc += dot(weighted, v_tile, tl.zeros([ROWS, BLOCK_V], tl.float32)) * largest
        if AHEAD:
            shown, k_codes, v_codes, k_scale, v_scale = following

    columns = tl.arange(0, BLOCK_V)
    inside_out = (rows < count)[:, None] & (columns < DIM_V)[None, :]
    if SPLIT:
        slots = (tl.cast(sequence_head, tl.int64) * count + rows) * splits + split
        tl.store(peaks + slots, peak, mask=rows < count)
        tl.store(totals + slots, total, mask=rows < count)
        if start < stop:
            tl.store(sums + slots[:, None] * DIM_V + columns[None, :], acc, mask=inside_out)
    else:
        factor, logarithm = close_rows(
            peak, total, sinks, head * GROUP + rows % GROUP, alpha, PRECISE, lse.pointer is not None
        )
        base = at_head(out, sequence, 0, head * GROUP)
        rounded = round_to(acc * factor[:, None], out.pointer.dtype.element_ty)
        tl.store(row_pointers(out, base, rows, columns, GROUP), rounded, mask=inside_out)
        if lse.pointer is not None:
            at = (rows // GROUP).to(tl.int64) * lse.time + (rows % GROUP).to(tl.int64) * lse.head
            tl.store(at_head(lse, sequence, 0, head * GROUP) + at, logarithm, mask=rows < count)


@triton.jit(do_not_specialize=["count", "splits"])
def merge_kernel(
    sums,
    peaks,
    totals,
    sinks,
    out,
    lse,
    count,
    heads,
    splits,
    DIM_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """One row from its splits, by their LSEs: each counts by exp(its peak - the highest peak)."""
    program = tl.program_id(0)
    row = program % count
    sequence_head = program // count
    head = sequence_head % heads
    sequence = sequence_head // heads
    first = tl.cast(program, tl.int64) * splits
    every = tl.arange(0, SPLITS)
    found = tl.load(peaks + first + every, mask=every < splits, other=float("-inf"))
    peak = tl.max(found[None, :], 1)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    columns = tl.arange(0, BLOCK_V)
    acc = tl.zeros([1, BLOCK_V], tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in tl.range(0, splits, AT_ONCE):
        some = start + tl.arange(0, AT_ONCE)
        there = some < splits
        weight = tl.load(peaks + first + some, mask=there, other=float("-inf"))
        weight = probabilities(weight, base, 1.0, False, PRECISE)
        part = tl.load(totals + first + some, mask=there, other=0.0)
        at = sums + (first + some)[:, None] * DIM_V + columns[None, :]
        # What has no keys has no sums. A NaN is not 0.
        mask = (there & (part != 0.0))[:, None] & (columns < DIM_V)[None, :]
        acc += tl.sum(weight[:, None] * tl.load(at, mask=mask, other=0.0), 0)[None, :]
        total += tl.sum((weight * part)[None, :], 1)
    rows = row + tl.arange(0, 1)
    factor, logarithm = close_rows(
        peak, total, sinks, head * GROUP + rows % GROUP, 1.0, PRECISE, lse.pointer is not None
    )
    out_at = row_pointers(out, at_head(out, sequence, 0, head * GROUP), rows, columns, GROUP)
    rounded = round_to(acc * factor[:, None], out.pointer.dtype.element_ty)
    tl.store(out_at, rounded, mask=(columns < DIM_V)[None, :])
    if lse.pointer is not None:
        at = (rows // GROUP).to(tl.int64) * lse.time + (rows % GROUP).to(tl.int64) * lse.head
        tl.store(at_head(lse, sequence, 0, head * GROUP) + at, logarithm)

"""Where a tile lies, and which tiles it meets.

Rows are the queries of all heads that share a KV head: row r of KV head h is query r // GROUP of
head h * GROUP + r % GROUP.

Records that a kernel makes hold no constants: Triton turns those of a tuple into tensors where the
tuple is assigned. Constants stay in the records that a kernel is given (`geometry`, `sizes`,
`scoring`), or in a record that is made in the call that takes it. No field may be called `values`,
which is an attribute of Triton's tuples.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from resformer_kernels._triton.launch import empty, launch
from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.attention.triton.configs import Config
from resformer_kernels.attention.triton.problem import Work, section, shared
from resformer_kernels.attention.triton.softmax import BOOLEAN, NO_BIAS, Seen


class Limits(NamedTuple):
    """Queries and keys of a sequence (at most, where packed), and the sides of the window."""

    q_len: Any
    k_len: Any
    left: Any
    right: Any


class Place(NamedTuple):
    """One KV head of one sequence."""

    batch: Any
    """Batch entry of the tensors: 0 where they are packed."""
    sequence: Any
    head: Any
    index: Any
    """sequence * KV heads + head."""
    q_start: Any
    k_start: Any
    """First query and key of the sequence, along the time axis."""
    q_len: Any
    k_len: Any
    count: Any
    """Rows: q_len * GROUP."""
    shift: Any
    """Query i stands at key i + shift."""
    left: Any
    right: Any


class Spans(NamedTuple):
    """The tiles that a tile meets: [begin, end), of which [inner_begin, inner_end) need no mask.

    Under a boolean mask these count entries of the list of open tiles: see `open_list`.
    """

    begin: Any
    inner_begin: Any
    inner_end: Any
    end: Any


@triton.jit
def place(geometry, limits, sequence, head):
    """The place of a sequence and KV head. Queries may be packed where keys are not."""
    if geometry.PACKED:
        q_start = tl.load(geometry.cu_q + sequence)
        q_len = tl.load(geometry.cu_q + sequence + 1) - q_start
        batch = sequence * 0
    else:
        q_start = sequence * 0
        q_len = limits.q_len
        batch = sequence
    if geometry.cu_k is not None:
        k_start = tl.load(geometry.cu_k + sequence)
        k_len = tl.load(geometry.cu_k + sequence + 1) - k_start
    else:
        k_start = sequence * 0
        k_len = limits.k_len
    return Place(
        batch,
        sequence,
        head,
        sequence * geometry.heads + head,
        q_start,
        k_start,
        q_len,
        k_len,
        q_len * geometry.GROUP,
        k_len - q_len,
        limits.left,
        limits.right,
    )


@triton.jit
def one_head(at, head):
    """The place of a single query head, whose rows are its queries: GROUP is then 1."""
    return Place(
        at.batch,
        at.sequence,
        head,
        at.index,
        at.q_start,
        at.k_start,
        at.q_len,
        at.k_len,
        at.q_len,
        at.shift,
        at.left,
        at.right,
    )


@triton.jit
def scheduled(work, geometry, limits, HEAVY_LAST: tl.constexpr):
    """(tile, place) of a program: `section` heads at a time, all their tiles before the next heads.

    The keys of a section then stay in the second-level cache. HEAVY_LAST: under a causal mask the
    last tiles have the most keys; they start first, so that no long tile is left over at the end.
    """
    program = tl.program_id(0)
    in_section = work.section * work.tiles
    first = program // in_section * work.section
    rest = program % in_section
    count = tl.minimum(work.section, work.sequences * geometry.heads - first)
    tile = rest // count
    if HEAVY_LAST:
        tile = work.tiles - 1 - tile
    index = first + rest % count
    return tile, place(geometry, limits, index // geometry.heads, index % geometry.heads)


@triton.jit
def key_bounds(rows, at, geometry):
    """The keys [lo, hi) that each row may see by position."""
    queries = rows // geometry.GROUP
    lo = queries * 0
    hi = tl.where(rows < at.count, at.k_len, 0)
    if geometry.HAS_RIGHT:
        hi = tl.minimum(hi, queries + (at.shift + at.right + 1))
    if geometry.HAS_LEFT:
        lo = queries + (at.shift - at.left)
    return lo, hi


@triton.jit
def key_tiles(first_row, last_row, at, geometry, KEYS: tl.constexpr):
    """The tiles of KEYS keys that rows [first_row, last_row] see; each sees all inner ones."""
    first = first_row // geometry.GROUP + at.shift
    last = last_row // geometry.GROUP + at.shift
    begin = first * 0
    inner_begin = begin
    inner_end = at.k_len // KEYS
    end = tl.cdiv(at.k_len, KEYS)
    if geometry.HAS_RIGHT:
        inner_end = tl.minimum(at.k_len, tl.maximum(first + at.right + 1, 0)) // KEYS
        end = tl.cdiv(tl.minimum(at.k_len, tl.maximum(last + at.right + 1, 0)), KEYS)
    if geometry.HAS_LEFT:
        begin = tl.maximum(first - at.left, 0) // KEYS
        inner_begin = tl.cdiv(tl.maximum(last - at.left, 0), KEYS)
        inner_begin = tl.maximum(tl.minimum(inner_begin, end), begin)
    inner_end = tl.maximum(inner_end, inner_begin)
    return Spans(begin, inner_begin, inner_end, end)


@triton.jit
def row_tiles(first_key, last_key, at, geometry, ROWS: tl.constexpr):
    """The tiles of ROWS rows that see keys [first_key, last_key]; rows of the inner ones all exist
    and see all of the keys."""
    begin = first_key * 0
    inner_begin = begin
    inner_end = at.q_len * geometry.GROUP // ROWS
    end = tl.cdiv(at.q_len * geometry.GROUP, ROWS)
    if geometry.HAS_LEFT:
        inner_end = tl.maximum(tl.minimum(at.q_len, first_key - at.shift + at.left + 1), 0)
        inner_end = inner_end * geometry.GROUP // ROWS
        end = tl.maximum(tl.minimum(at.q_len, last_key - at.shift + at.left + 1), 0)
        end = tl.cdiv(end * geometry.GROUP, ROWS)
    if geometry.HAS_RIGHT:
        begin = tl.maximum(first_key - at.shift - at.right, 0) * geometry.GROUP // ROWS
        inner_begin = tl.cdiv(tl.maximum(last_key - at.shift - at.right, 0) * geometry.GROUP, ROWS)
        inner_begin = tl.maximum(tl.minimum(inner_begin, end), begin)
    inner_end = tl.maximum(inner_end, inner_begin)
    return Spans(begin, inner_begin, inner_end, end)


@triton.jit
def open_list(work, tile, at):
    """Pointer to the list of a tile under a boolean mask: its length, then the open tiles."""
    entry = tl.cast(at.index, tl.int64) * work.tiles + tile
    return work.open_tiles + entry * work.list_size


@triton.jit
def narrowed(spans, work, tile, at, BIAS: tl.constexpr):
    """The tiles that a tile meets under a bias: none is free of masks, and a boolean mask lists the
    open ones."""
    begin, inner_begin, inner_end, end = spans
    if BIAS == BOOLEAN:
        inner_end = begin * 0
        end = tl.load(open_list(work, tile, at))
    elif BIAS != NO_BIAS:
        inner_end = begin
    return Spans(begin, inner_begin, inner_end, end)


@triton.jit
def phase_span(spans, PHASE: tl.constexpr):
    """(first, last + 1) of the tiles before (0), inside (1) and after (2) those without a mask."""
    if PHASE == 0:
        start = spans.begin
        stop = spans.inner_begin
    elif PHASE == 1:
        start = spans.inner_begin
        stop = spans.inner_end
    else:
        start = spans.inner_end
        stop = spans.end
    return start, stop


@triton.jit
def tile_start(step, work, tile, at, SIZE: tl.constexpr, BIAS: tl.constexpr):
    """The first row or key of the tile that a step of the loop meets."""
    first = step * SIZE
    if BIAS == BOOLEAN:
        first = tl.load(open_list(work, tile, at) + 1 + step) * SIZE
    return first


@triton.jit
def bias_tile(rows, at, scoring, geometry):
    """(start, offsets of rows from it) in attn_bias, at key 0."""
    if scoring.BIAS == NO_BIAS:
        start = tl.cast(at.sequence, tl.int64)
        offsets = rows
    else:
        bias = scoring.bias
        first_head = tl.cast(at.head * geometry.GROUP, tl.int64)
        start = tl.cast(at.sequence, tl.int64) * bias.batch + first_head * bias.head
        queries = (rows // geometry.GROUP).to(scoring.INDEX) * bias.query
        offsets = queries + (rows % geometry.GROUP).to(scoring.INDEX) * bias.head
    return start, offsets


@triton.jit
def seen_by_rows(rows, at, scoring, geometry):
    """What rows may see, for scores of shape (rows, keys)."""
    lo, hi = key_bounds(rows, at, geometry)
    start, offsets = bias_tile(rows, at, scoring, geometry)
    return Seen(lo[:, None], hi[:, None], start, offsets[:, None])


@triton.jit
def seen_by_columns(rows, at, scoring, geometry):
    """What rows may see, for scores of shape (keys, rows)."""
    lo, hi = key_bounds(rows, at, geometry)
    start, offsets = bias_tile(rows, at, scoring, geometry)
    return Seen(lo[None, :], hi[None, :], start, offsets[None, :])


@triton.jit
def spans_of_rows(tile, at, geometry, sizes):
    """(rows of a tile, the tiles of keys that they meet)."""
    first = tile * sizes.ROWS
    rows = first + tl.arange(0, sizes.ROWS)
    last = tl.minimum(first + sizes.ROWS, at.count) - 1
    return rows, key_tiles(first, last, at, geometry, sizes.KEYS)


@triton.jit
def open_tiles_kernel(
    work,
    scoring,
    geometry,
    q_len,
    k_len,
    window_left,
    window_right,
    sizes,
    BY_ROWS: tl.constexpr,
):
    """For a tile of rows, the tiles of keys in which a boolean mask lets any row see any key.

    Not BY_ROWS: for a tile of keys, those tiles of rows. work.open_tiles, (sequence, head, outer
    tile, list_size), receives their number and then their indices.
    """
    ROWS: tl.constexpr = sizes.ROWS
    KEYS: tl.constexpr = sizes.KEYS
    outer = tl.program_id(0) % work.tiles
    index = tl.program_id(0) // work.tiles
    limits = Limits(q_len, k_len, window_left, window_right)
    at = place(geometry, limits, index // geometry.heads, index % geometry.heads)
    listed = work.open_tiles + tl.cast(tl.program_id(0), tl.int64) * work.list_size
    if BY_ROWS:
        last = tl.minimum(outer * ROWS + ROWS, at.count) - 1
        spans = key_tiles(outer * ROWS, last, at, geometry, KEYS)
        empty = outer * ROWS >= at.count
    else:
        last = tl.minimum(outer * KEYS + KEYS, at.k_len) - 1
        spans = row_tiles(outer * KEYS, last, at, geometry, ROWS)
        empty = outer * KEYS >= at.k_len
    end = tl.where(empty, spans.begin, spans.end)
    found = spans.begin * 0
    for step in tl.range(spans.begin, end):
        if BY_ROWS:
            rows = outer * ROWS + tl.arange(0, ROWS)
            keys = step * KEYS + tl.arange(0, KEYS)
        else:
            rows = step * ROWS + tl.arange(0, ROWS)
            keys = outer * KEYS + tl.arange(0, KEYS)
        lo, hi = key_bounds(rows, at, geometry)
        # (ROWS, KEYS)
        inside = (keys[None, :] < hi[:, None]) & (keys[None, :] >= lo[:, None])
        start, offsets = bias_tile(rows, at, scoring, geometry)
        cell = offsets[:, None] + keys.to(scoring.INDEX)[None, :] * scoring.bias.key
        seen = tl.load(scoring.bias.pointer + start + cell, mask=inside, other=0)
        is_open = tl.max(tl.max((seen != 0).to(tl.int32), 1), 0)
        tl.store(listed + 1 + found, step, mask=is_open != 0)
        found += is_open
    tl.store(listed, found)


def work_of(call: AttentionCall, config: Config, *, by_rows: bool) -> Work:
    """A program for each tile of rows, which passes over the keys; or the other way round."""
    extents = ((call.max_rows, config.rows), (call.max_seqlen_k, config.keys))
    (length, size), (passed, step) = extents if by_rows else extents[::-1]
    tiles = -(-length // size)
    work = Work(call.sequences, tiles, section(call, passed), None, 0)
    if call.attn_bias is None or call.attn_bias.dtype is not torch.bool:
        return work
    entries = 1 + -(-passed // step)
    shape = (call.sequences, call.kv_heads, tiles, entries)
    listed = empty(call.q, shape, torch.int32)
    work = work._replace(open_tiles=listed, list_size=entries)
    launch(
        open_tiles_kernel,
        (call.sequences * call.kv_heads * tiles,),
        call.q.device,
        work=work,
        BY_ROWS=by_rows,
        num_warps=4,
        **shared(call, config.rows, config.keys),
    )
    return work

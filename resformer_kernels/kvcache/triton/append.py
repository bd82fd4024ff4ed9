"""New tokens, written into a cache as they are or as codes with scales."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.device import let_next_start
from resformer_kernels._triton.launch import launch
from resformer_kernels._triton.views import view_of
from resformer_kernels.kvcache.triton.codes import PLAIN, quantised
from resformer_kernels.kvcache.triton.places import Place, place_of, rows_of
from resformer_kernels.kvcache.triton.problem import Problem

_ELEMENTS = 2048
"""Heads times channels of a program."""


@triton.jit
def _append(side, new, source, heads, place):
    """Write the heads of one token, which lies at `source` = (sequence, token) of `new`."""
    sequence, token = source
    head = heads.to(tl.int64)
    columns = tl.arange(0, side.BLOCK)
    mask = place.inside[:, None] & (columns < side.WIDTH)[None, :]
    start = tl.cast(sequence, tl.int64) * new.batch + tl.cast(token, tl.int64) * new.time
    read = start + head[:, None] * new.head + columns[None, :]
    # (HEADS, BLOCK)
    x = tl.load(new.pointer + read, mask=mask, other=0.0)
    write = rows_of(side.codes, place) + head[:, None] * side.codes.head + columns[None, :]
    if side.STORED == PLAIN:
        tl.store(side.codes.pointer + write, x, mask=mask)
    else:
        codes, scales = quantised(x, side.LARGEST, side.STORED)
        tl.store(side.codes.pointer + write, codes, mask=mask)
        at = rows_of(side.scales, place) + head * side.scales.head
        tl.store(side.scales.pointer + at, scales, mask=place.inside)


@triton.jit
def _sequence_of(offsets, sequences, row):
    """(the sequence of a packed row, its offset); the last one for rows after it."""
    low = row * 0
    high = sequences + low
    first = tl.load(offsets + low)
    while high - low > 1:
        middle = (low + high) // 2
        offset = tl.load(offsets + middle)
        after = offset <= row
        first = tl.where(after, offset, first)
        low = tl.where(after, middle, low)
        high = tl.where(after, high, middle)
    return low, first


@triton.jit
def append_kernel(
    keys,
    values,
    k,
    v,
    counters,
    seqlens,
    cu_new,
    tokens,
    capacity,
    sequences,
    heads,
    head_tiles,
    row_tiles,
    HEADS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Some heads of one new token of a sequence, written after the `seqlens` that it has.

    A token beyond the capacity, or whose page does not exist, is not written. k and v may be None.
    They have `tokens` rows a sequence; or in all, of which sequence b has those between `cu_new[b]`
    and `cu_new[b + 1]`. `counters`, one per head and tile of rows, become 0 for the attention that
    follows, or are None.
    """
    let_next_start(DEPENDENT)
    program = tl.program_id(0)
    rows = program % head_tiles * HEADS + tl.arange(0, HEADS)
    row = program // head_tiles
    batch = row // tokens
    time = row % tokens
    if cu_new is not None:
        sequence, first = _sequence_of(cu_new, sequences, time)
        token = time - first
        inside = time < tl.load(cu_new + sequence + 1)
    else:
        sequence = batch
        token = time
        inside = token >= 0
    key = tl.load(seqlens + sequence) + token
    inside = inside & (key >= 0) & (key < capacity)
    if k.pointer is not None:
        at = place_of(keys.pool, sequence, key, inside)
        _append(keys, k, (batch, time), rows, Place(at.row, at.token, (rows < heads) & at.inside))
    if v.pointer is not None:
        at = place_of(values.pool, sequence, key, inside)
        _append(values, v, (batch, time), rows, Place(at.row, at.token, (rows < heads) & at.inside))
    if counters is not None:
        # By the programs of the first token.
        for i in tl.range(0, tl.where(token == 0, row_tiles, 0)):
            counter = counters + (sequence * heads + rows) * row_tiles + i
            tl.store(counter, tl.zeros([HEADS], tl.int32), mask=rows < heads)


def append(p: Problem, counters: Tensor | None) -> None:
    """Write k and v into the caches, and 0 into the counters, (sequences, KV heads, any)."""
    call = p.call
    rows = call.new_rows * (1 if call.cu_seqlens_k_new is not None else p.sequences)
    if rows == 0 or p.sequences == 0:
        return
    keys, values = p.sides()
    widest = max(keys.BLOCK.value, values.BLOCK.value)
    at_once = min(1 << (p.heads - 1).bit_length(), max(1, _ELEMENTS // widest))
    head_tiles = -(-p.heads // at_once)
    launch(
        append_kernel,
        (rows * head_tiles,),
        call.q.device,
        keys=keys,
        values=values,
        k=view_of(call.k),
        v=view_of(call.v),
        counters=counters,
        row_tiles=0 if counters is None else counters.shape[2],
        head_tiles=head_tiles,
        HEADS=at_once,
        DEPENDENT=p.dependent,
        num_warps=4 if at_once * widest >= 1024 else 1,
        heads=p.heads,
        sequences=p.sequences,
        **p.lengths(),
    )

"""The gradient of an additive attn_bias on a GPU, summed in a fixed order where it broadcasts."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.device import dot
from resformer_kernels._triton.launch import empty, launch
from resformer_kernels._triton.views import view_of
from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.attention.triton.keys import summed_to
from resformer_kernels.attention.triton.loads import Source, load_keys, load_row_tile, row_slot
from resformer_kernels.attention.triton.problem import config_of, shared
from resformer_kernels.attention.triton.rows import Incoming
from resformer_kernels.attention.triton.softmax import probabilities, scores
from resformer_kernels.attention.triton.tiles import (
    Limits,
    key_tiles,
    one_head,
    place,
    row_tiles,
    seen_by_rows,
)

# What a program sums dS over: sequences and heads that share the bias, all queries, or all keys.
OVER_HEADS: tl.constexpr = tl.constexpr(0)
OVER_QUERIES: tl.constexpr = tl.constexpr(1)
OVER_KEYS: tl.constexpr = tl.constexpr(2)


class Sums(NamedTuple):
    """dS summed, (sequences, heads, queries, keys) without the axis that is summed over, and how
    programs share it."""

    pointer: Tensor
    heads: int
    inner_sequences: int
    inner_heads: int
    """Sequences and heads that one program sums over."""
    q_tiles: int
    k_tiles: int
    OVER: tl.constexpr


@triton.jit
def bias_gradient_kernel(
    q,
    k,
    mixed,
    grad_out,
    base,
    delta,
    rest,
    slots,
    sums,
    scoring,
    geometry,
    by_head,
    q_len,
    k_len,
    window_left,
    window_right,
    sizes,
):
    """Sums of dS, rows being the queries of one head: `by_head` is the geometry with a GROUP of 1.

    A program belongs to one sequence and head of `sums`, and adds up those that share its bias. It
    writes as far as q_len and k_len go.
    """
    ROWS: tl.constexpr = sizes.ROWS
    KEYS: tl.constexpr = sizes.KEYS
    OVER: tl.constexpr = sums.OVER
    WIDE: tl.constexpr = tl.float64 if scoring.PRECISE else tl.float32
    limits = Limits(q_len, k_len, window_left, window_right)
    program = tl.program_id(0)
    outer = program // (sums.q_tiles * sums.k_tiles)
    q_tile_index = program // sums.k_tiles % sums.q_tiles
    k_tile_index = program % sums.k_tiles
    first_sequence = outer // sums.heads
    first_head = outer % sums.heads
    if OVER == OVER_HEADS:
        total = tl.zeros([ROWS, KEYS], WIDE)
    elif OVER == OVER_QUERIES:
        total = tl.zeros([KEYS], WIDE)
    else:
        total = tl.zeros([ROWS], WIDE)
    for pair in tl.range(0, sums.inner_sequences * sums.inner_heads):
        sequence = first_sequence + pair // sums.inner_heads
        head_q = first_head + pair % sums.inner_heads
        of_keys = place(geometry, limits, sequence, head_q // geometry.GROUP)
        at = one_head(of_keys, head_q)
        slot = row_slot(of_keys, slots, geometry) + head_q % geometry.GROUP
        if OVER == OVER_QUERIES:
            first_key = k_tile_index * KEYS
            last_key = tl.minimum(first_key + KEYS, at.k_len) - 1
            spans = row_tiles(first_key, last_key, at, by_head, ROWS)
            begin = spans.begin
            end = tl.where(first_key < at.k_len, spans.end, begin)
        else:
            first_row = q_tile_index * ROWS
            last_row = tl.minimum(first_row + ROWS, at.q_len) - 1
            spans = key_tiles(first_row, last_row, at, by_head, KEYS)
            begin = spans.begin
            end = spans.end
            if OVER == OVER_HEADS:
                begin = tl.maximum(begin, k_tile_index)
                end = tl.minimum(end, k_tile_index + 1)
            end = tl.where(first_row < at.q_len, end, begin)
        for step in tl.range(begin, end):
            if OVER == OVER_QUERIES:
                row = step * ROWS
                key = k_tile_index * KEYS
            else:
                row = q_tile_index * ROWS
                key = step * KEYS
            rows = row + tl.arange(0, ROWS)
            keys = key + tl.arange(0, KEYS)
            # (ROWS, BLOCK_K), (KEYS, BLOCK_K)
            q_tile = load_row_tile(
                Source(q, None, by_head, sizes.DIM_K, sizes.BLOCK_K), at, row, ROWS, True
            )
            k_tile = load_keys(
                Source(k, None, geometry, sizes.DIM_K, sizes.BLOCK_K), of_keys, key, KEYS, True
            )
            # (ROWS, KEYS)
            product = dot(q_tile, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32))
            seen = seen_by_rows(rows, at, scoring, by_head)
            x, _slope = scores(product, keys[None, :], seen, scoring, True)
            cells = slot + rows * geometry.GROUP
            row_base = tl.load(base + cells, mask=rows < at.q_len, other=0.0)
            row_delta = tl.load(delta + cells, mask=rows < at.q_len, other=0.0)
            row_rest = tl.load(rest + cells, mask=rows < at.q_len, other=0.0)
            p = probabilities(x, row_base[:, None], row_rest[:, None], scoring)
            # (ROWS, BLOCK_V), (KEYS, BLOCK_V)
            grad_tile = load_row_tile(
                Source(grad_out, None, by_head, sizes.DIM_V, sizes.BLOCK_V), at, row, ROWS, True
            )
            v_tile = load_keys(
                Source(mixed, None, geometry, sizes.DIM_V, sizes.BLOCK_V), of_keys, key, KEYS, True
            )
            dp = dot(grad_tile, tl.trans(v_tile), tl.zeros([ROWS, KEYS], tl.float32))
            ds = (p * (dp - row_delta[:, None])).to(WIDE)
            if OVER == OVER_HEADS:
                total += ds
            elif OVER == OVER_QUERIES:
                total += tl.sum(ds, 0)
            else:
                total += tl.sum(ds, 1)
    rows = q_tile_index * ROWS + tl.arange(0, ROWS)
    keys = k_tile_index * KEYS + tl.arange(0, KEYS)
    start = tl.cast(outer, tl.int64)
    if OVER == OVER_HEADS:
        cells = (start * q_len + rows.to(tl.int64)[:, None]) * k_len + keys[None, :]
        inside = (rows < q_len)[:, None] & (keys < k_len)[None, :]
    elif OVER == OVER_QUERIES:
        cells = start * k_len + keys
        inside = keys < k_len
    else:
        cells = start * q_len + rows
        inside = rows < q_len
    tl.store(sums.pointer + cells, total.to(tl.float32), mask=inside)


def bias_gradient(call: AttentionCall, incoming: Incoming, bias: Tensor) -> Tensor:
    """The gradient of an additive attn_bias, (batch or 1, heads or 1, queries or 1, keys or 1)."""
    config = config_of(call, "bias", "full")
    q_tiles, k_tiles = -(-call.max_seqlen_q // config.rows), -(-call.max_seqlen_k // config.keys)
    sequences, heads = call.sequences, call.q.shape[-2]
    inner = (1, 1)
    if bias.shape[3] == 1 and call.max_seqlen_k > 1:
        over, shape = OVER_KEYS, (sequences, heads, call.max_seqlen_q, 1)
        k_tiles = 1
    elif bias.shape[2] == 1 and call.max_seqlen_q > 1:
        over, shape = OVER_QUERIES, (sequences, heads, 1, call.max_seqlen_k)
        q_tiles = 1
    else:
        over, shape = OVER_HEADS, (*bias.shape[:2], call.max_seqlen_q, call.max_seqlen_k)
        inner = (
            sequences if bias.shape[0] == 1 else 1,
            heads if bias.shape[1] == 1 else 1,
        )
    sums = empty(call.q, shape, torch.float32)
    arguments = shared(call, config.rows, config.keys)
    launch(
        bias_gradient_kernel,
        (shape[0] * shape[1] * q_tiles * k_tiles,),
        call.q.device,
        q=view_of(call.q),
        k=view_of(call.k),
        mixed=view_of(incoming.mixed),
        grad_out=view_of(incoming.grad_out),
        sums=Sums(sums, shape[1], *inner, q_tiles, k_tiles, over),
        num_warps=config.warps,
        num_stages=config.stages,
        **incoming.row_numbers(),
        by_head=arguments["geometry"]._replace(GROUP=tl.constexpr(1)),
        **arguments,
    )
    return summed_to(sums, bias)

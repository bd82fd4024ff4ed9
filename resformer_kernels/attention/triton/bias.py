"""The gradient of an additive attn_bias on a GPU, summed in a fixed order where it broadcasts."""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels._triton.device import dot
from resformer_kernels.attention.triton.loads import (
    load_keys,
    load_row_tile,
    row_slot,
)
from resformer_kernels.attention.triton.tiles import (
    bias_tile,
    key_bounds,
    key_tiles,
    probabilities,
    row_tiles,
    scores,
    sequence_of,
)

# Over what one program sums dS: sequences and heads that share the bias, all queries, or all keys.
OVER_HEADS: tl.constexpr = tl.constexpr(0)
OVER_QUERIES: tl.constexpr = tl.constexpr(1)
OVER_KEYS: tl.constexpr = tl.constexpr(2)


@triton.jit(do_not_specialize=["q_len", "k_len", "window_left", "window_right"])
def bias_gradient_kernel(
    q,
    k,
    mixed,
    grad_out,
    base,
    delta,
    bias,
    dbias,
    cu_q,
    cu_k,
    q_len,
    k_len,
    slots,
    outer_heads,
    inner_sequences,
    inner_heads,
    q_tiles,
    k_tiles,
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
    OVER: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISE: tl.constexpr,
    PACKED: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Sums of dS, rows being the queries of one head.

    A program belongs to one pair of an outer sequence and head, and sums over inner_sequences x
    inner_heads. dbias: (outer sequences, outer_heads, queries, keys), without the axis that is
    summed over; it is written as far as q_len and k_len go.
    """
    WIDE: tl.constexpr = tl.float64 if PRECISE else tl.float32
    q_size = q_len
    k_size = k_len
    program = tl.program_id(0)
    outer = program // (q_tiles * k_tiles)
    q_tile_index = program // k_tiles % q_tiles
    k_tile_index = program % k_tiles
    first_sequence = outer // outer_heads
    first_head = outer % outer_heads
    if OVER == OVER_HEADS:
        total = tl.zeros([ROWS, KEYS], WIDE)
    elif OVER == OVER_QUERIES:
        total = tl.zeros([KEYS], WIDE)
    else:
        total = tl.zeros([ROWS], WIDE)
    for pair in tl.range(0, inner_sequences * inner_heads):
        sequence = first_sequence + pair // inner_heads
        head_q = first_head + pair % inner_heads
        head = head_q // GROUP
        batch, q_start, k_start, q_len, k_len = sequence_of(
            cu_q, cu_k, sequence, q_size, k_size, PACKED
        )
        shift = k_len - q_len
        slot = row_slot(sequence, q_start, head, q_len, slots, GROUP, PACKED) + head_q % GROUP
        if OVER == OVER_QUERIES:
            first_key = k_tile_index * KEYS
            last_key = tl.minimum(first_key + KEYS, k_len) - 1
            begin, _inner_begin, _inner_end, end = row_tiles(
                first_key, last_key, shift, q_len, window_left, window_right, 1, ROWS, HAS_LEFT,
                HAS_RIGHT,
            )  # fmt: skip
            end = tl.where(first_key < k_len, end, begin)
        else:
            first_row = q_tile_index * ROWS
            last_row = tl.minimum(first_row + ROWS, q_len) - 1
            begin, _inner_begin, _inner_end, end = key_tiles(
                first_row, last_row, shift, k_len, window_left, window_right, 1, KEYS, HAS_LEFT,
                HAS_RIGHT,
            )  # fmt: skip
            if OVER == OVER_HEADS:
                begin = tl.maximum(begin, k_tile_index)
                end = tl.minimum(end, k_tile_index + 1)
            end = tl.where(first_row < q_len, end, begin)
        for step in tl.range(begin, end):
            if OVER == OVER_QUERIES:
                row = step * ROWS
                key = k_tile_index * KEYS
            else:
                row = q_tile_index * ROWS
                key = step * KEYS
            rows = row + tl.arange(0, ROWS)
            keys = key + tl.arange(0, KEYS)
            q_tile = load_row_tile(
                q, None, batch, q_start, row, head_q, q_len, DIM_K, BLOCK_K, ROWS, 1, True, PACKED
            )
            k_tile = load_keys(
                k, None, batch, k_start, key, head, k_len, DIM_K, BLOCK_K, KEYS, True, PACKED
            )
            product = dot(q_tile, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32))
            lo, hi = key_bounds(
                rows, q_len, shift, k_len, window_left, window_right, 1, HAS_LEFT, HAS_RIGHT
            )
            bias_start, bias_offsets = bias_tile(bias, sequence, head_q, rows, 1, BIAS, INDEX)
            x, _slope = scores(
                product, keys[None, :], lo[:, None], hi[:, None], bias, bias_start,
                bias_offsets[:, None], alpha, softcap, True, HAS_LEFT, CAPPED, BIAS, False, PRECISE,
                INDEX,
            )  # fmt: skip
            at = slot + rows * GROUP
            row_base = tl.load(base + at, mask=rows < q_len, other=0.0)
            row_delta = tl.load(delta + at, mask=rows < q_len, other=0.0)
            p = probabilities(x, row_base[:, None], alpha, False, PRECISE)
            grad_tile = load_row_tile(
                grad_out,
                None,
                batch,
                q_start,
                row,
                head_q,
                q_len,
                DIM_V,
                BLOCK_V,
                ROWS,
                1,
                True,
                PACKED,
            )
            v_tile = load_keys(
                mixed, None, batch, k_start, key, head, k_len, DIM_V, BLOCK_V, KEYS, True, PACKED
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
        at = (start * q_size + rows.to(tl.int64)[:, None]) * k_size + keys[None, :]
        inside = (rows < q_size)[:, None] & (keys < k_size)[None, :]
    elif OVER == OVER_QUERIES:
        at = start * k_size + keys
        inside = keys < k_size
    else:
        at = start * q_size + rows
        inside = rows < q_size
    tl.store(dbias + at, total.to(tl.float32), mask=inside)

"""The gradient of the queries on a GPU: one tile of rows a program, which passes over its keys."""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels._triton.device import dot, round_to
from resformer_kernels.attention.triton.loads import (
    at_head,
    load_keys,
    load_row_numbers,
    load_row_tile,
    row_pointers,
    row_slot,
)
from resformer_kernels.attention.triton.tiles import (
    BOOLEAN,
    NO_BIAS,
    bias_tile,
    key_bounds,
    key_tiles,
    probabilities,
    scheduled,
    scores,
    sequence_of,
)


@triton.jit(do_not_specialize=["q_len", "k_len", "window_left", "window_right"])
def queries_gradient_kernel(
    q,
    k,
    mixed,
    grad_out,
    base,
    delta,
    bias,
    listed,
    dq,
    cu_q,
    cu_k,
    k_descriptor,
    mixed_descriptor,
    q_len,
    k_len,
    heads,
    slots,
    sequences,
    tiles,
    list_size,
    section,
    window_left,
    window_right,
    scale,
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
    BIAS: tl.constexpr,
    RAW: tl.constexpr,
    PRECISE: tl.constexpr,
    PACKED: tl.constexpr,
    INDEX: tl.constexpr,
):
    """dQ of one tile of rows; `mixed` is V'."""
    tile, sequence_head = scheduled(
        tl.program_id(0), tiles, sequences * heads, section, HAS_RIGHT and not HAS_LEFT
    )
    head = sequence_head % heads
    sequence = sequence_head // heads
    batch, q_start, k_start, q_len, k_len = sequence_of(cu_q, cu_k, sequence, q_len, k_len, PACKED)
    count = q_len * GROUP
    first_row = tile * ROWS
    if first_row >= count:
        return
    rows = first_row + tl.arange(0, ROWS)
    q_tile = load_row_tile(
        q, None, batch, q_start, first_row, head, count, DIM_K, BLOCK_K, ROWS, GROUP, True, PACKED
    )
    grad_tile = load_row_tile(
        grad_out,
        None,
        batch,
        q_start,
        first_row,
        head,
        count,
        DIM_V,
        BLOCK_V,
        ROWS,
        GROUP,
        True,
        PACKED,
    )
    slot = row_slot(sequence, q_start, head, q_len, slots, GROUP, PACKED)
    row_base = load_row_numbers(base, None, slot, first_row, count, ROWS, True)
    row_delta = load_row_numbers(delta, None, slot, first_row, count, ROWS, True)
    shift = k_len - q_len
    lo, hi = key_bounds(
        rows, count, shift, k_len, window_left, window_right, GROUP, HAS_LEFT, HAS_RIGHT
    )
    begin, inner_begin, inner_end, end = key_tiles(
        first_row, tl.minimum(first_row + ROWS, count) - 1, shift, k_len, window_left,
        window_right, GROUP, KEYS, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    bias_start, bias_offsets = bias_tile(bias, sequence, head, rows, GROUP, BIAS, INDEX)
    if BIAS != NO_BIAS:
        inner_end = begin
    if BIAS == BOOLEAN:
        open_keys = listed + (tl.cast(sequence_head, tl.int64) * tiles + tile) * list_size
        inner_end = begin * 0
        end = tl.load(open_keys)
    dq_tile = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for phase in tl.static_range(2 if BIAS != NO_BIAS else 0 if HAS_LEFT else 1, 3):
        if phase == 0:
            start = begin
            stop = inner_begin
        elif phase == 1:
            start = inner_begin
            stop = inner_end
        else:
            start = inner_end
            stop = end
        for step in tl.range(start, stop):
            key = step * KEYS
            if BIAS == BOOLEAN:
                key = tl.load(open_keys + 1 + step) * KEYS
            keys = key + tl.arange(0, KEYS)
            k_tile = load_keys(
                k, k_descriptor, batch, k_start, key, head, k_len, DIM_K, BLOCK_K, KEYS,
                phase != 1, PACKED,
            )  # fmt: skip
            product = dot(q_tile, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32))
            x, slope = scores(
                product, keys[None, :], lo[:, None], hi[:, None], bias, bias_start,
                bias_offsets[:, None], alpha, softcap, phase != 1, HAS_LEFT, CAPPED, BIAS, RAW,
                PRECISE, INDEX,
            )  # fmt: skip
            p = probabilities(x, row_base[:, None], alpha, RAW, PRECISE)
            v_tile = load_keys(
                mixed, mixed_descriptor, batch, k_start, key, head, k_len, DIM_V, BLOCK_V, KEYS,
                phase != 1, PACKED,
            )  # fmt: skip
            dp = dot(grad_tile, tl.trans(v_tile), tl.zeros([ROWS, KEYS], tl.float32))
            ds = p * (dp - row_delta[:, None])
            if CAPPED:
                ds = ds * slope
            dq_tile = dot(round_to(ds, k_tile.dtype), k_tile, dq_tile)
    columns = tl.arange(0, BLOCK_K)
    dq_base = at_head(dq, batch, q_start, head * GROUP)
    tl.store(
        row_pointers(dq, dq_base, rows, columns, GROUP),
        round_to(dq_tile * scale, dq.pointer.dtype.element_ty),
        mask=(rows < count)[:, None] & (columns < DIM_K)[None, :],
    )

"""Forward on a GPU: out = softmax(scale Q K^T ...) V', one tile of rows a program.

V' = lambda_v V + lambda_first V1 (arXiv 2410.17897) is mixed in the loop over tiles of keys, or by
`mix_kernel` before it: the same function of the same numbers, so the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels._triton.device import dot, round_to
from resformer_kernels.attention.triton.loads import (
    at_head,
    load_keys,
    load_row_tile,
    load_values,
    row_pointers,
)
from resformer_kernels.attention.triton.tiles import (
    BOOLEAN,
    NO_BIAS,
    bias_tile,
    close_rows,
    key_bounds,
    key_tiles,
    scheduled,
    scores,
    sequence_of,
    softmax_step,
)


@triton.jit
def mix_kernel(
    values,
    out,
    cu_k,
    k_len,
    heads,
    sequences,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    OWN_FORM: tl.constexpr,
    FIRST_FORM: tl.constexpr,
    PACKED: tl.constexpr,
):
    """V' of KEYS keys of one head and batch entry; zeros where no sequence lies."""
    tiles = tl.cdiv(k_len, KEYS)
    program = tl.program_id(0)
    head = program % heads
    key = program // heads % tiles * KEYS
    batch = program // heads // tiles
    count = k_len
    if PACKED:
        count = tl.load(cu_k + sequences)
    mixed = load_values(
        values, None, None, batch, 0, key, head, count, DIM, BLOCK_DIM, KEYS, OWN_FORM, FIRST_FORM,
        True, True, PACKED,
    )  # fmt: skip
    keys = key + tl.arange(0, KEYS)
    columns = tl.arange(0, BLOCK_DIM)
    at = at_head(out, batch, 0, head) + keys.to(tl.int64)[:, None] * out.time + columns[None, :]
    tl.store(at, mixed, mask=(keys < k_len)[:, None] & (columns < DIM)[None, :])


@triton.jit
def clear_tail_kernel(x, cu_seqlens, sequences, total, row_size, BLOCK: tl.constexpr):
    """Zeros for the rows of a contiguous packed tensor that lie after its last sequence."""
    at = tl.load(cu_seqlens + sequences).to(tl.int64) * row_size
    end = tl.cast(total, tl.int64) * row_size
    at += tl.program_id(0) * BLOCK
    while at < end:
        offsets = at + tl.arange(0, BLOCK)
        tl.store(x + offsets, tl.zeros([BLOCK], x.dtype.element_ty), mask=offsets < end)
        at += tl.num_programs(0) * BLOCK


@triton.jit(do_not_specialize=["q_len", "k_len", "window_left", "window_right"])
def forward_kernel(
    q,
    k,
    values,
    out,
    lse,
    bias,
    sinks,
    open_tiles,
    cu_q,
    cu_k,
    k_descriptor,
    v_descriptor,
    first_descriptor,
    q_len,
    k_len,
    heads,
    sequences,
    row_tiles,
    list_size,
    section,
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
    OWN_FORM: tl.constexpr,
    FIRST_FORM: tl.constexpr,
    MIXES: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
    BIAS: tl.constexpr,
    RAW: tl.constexpr,
    PRECISE: tl.constexpr,
    PACKED: tl.constexpr,
    INDEX: tl.constexpr,
):
    """One tile of ROWS rows of one KV head. `lse` and `sinks` may be None."""
    tile, sequence_head = scheduled(
        tl.program_id(0), row_tiles, sequences * heads, section, HAS_RIGHT and not HAS_LEFT
    )
    head = sequence_head % heads
    sequence = sequence_head // heads
    batch, q_start, k_start, q_len, k_len = sequence_of(cu_q, cu_k, sequence, q_len, k_len, PACKED)
    count = q_len * GROUP
    if tile * ROWS >= count:
        return
    rows = tile * ROWS + tl.arange(0, ROWS)
    q_tile = load_row_tile(
        q, None, batch, q_start, tile * ROWS, head, count, DIM_K, BLOCK_K, ROWS, GROUP, True,
        PACKED,
    )  # fmt: skip
    shift = k_len - q_len
    lo, hi = key_bounds(
        rows, count, shift, k_len, window_left, window_right, GROUP, HAS_LEFT, HAS_RIGHT
    )
    begin, inner_begin, inner_end, end = key_tiles(
        tile * ROWS, tl.minimum(tile * ROWS + ROWS, count) - 1, shift, k_len, window_left,
        window_right, GROUP, KEYS, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    bias_start, bias_offsets = bias_tile(bias, sequence, head, rows, GROUP, BIAS, INDEX)
    if BIAS != NO_BIAS:
        inner_end = begin
    if BIAS == BOOLEAN:
        listed = open_tiles + (tl.cast(sequence_head, tl.int64) * row_tiles + tile) * list_size
        inner_end = begin * 0
        end = tl.load(listed)

    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # Tiles before, inside and after those that every row sees whole.
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
                key = tl.load(listed + 1 + step) * KEYS
            # Keys past the last one need no zeros: their scores are masked, whatever they are.
            k_tile = load_keys(
                k, k_descriptor, batch, k_start, key, head, k_len, DIM_K, BLOCK_K, KEYS,
                phase != 1, False,
            )  # fmt: skip
            product = dot(q_tile, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32))
            keys = key + tl.arange(0, KEYS)
            x, _slope = scores(
                product, keys[None, :], lo[:, None], hi[:, None], bias, bias_start,
                bias_offsets[:, None], alpha, softcap, phase != 1, HAS_LEFT, CAPPED, BIAS, RAW,
                PRECISE, INDEX,
            )  # fmt: skip
            p, peak, total, acc = softmax_step(x, peak, total, acc, alpha, RAW, PRECISE)
            v_tile = load_values(
                values, v_descriptor, first_descriptor, batch, k_start, key, head, k_len, DIM_V,
                BLOCK_V, KEYS, OWN_FORM, FIRST_FORM, MIXES, phase != 1, PACKED,
            )  # fmt: skip
            acc = dot(round_to(p, v_tile.dtype), v_tile, acc)

    factor, logarithm = close_rows(
        peak, total, sinks, head * GROUP + rows % GROUP, alpha, PRECISE, lse.pointer is not None
    )
    columns = tl.arange(0, BLOCK_V)
    out_base = at_head(out, batch, q_start, head * GROUP)
    inside = (rows < count)[:, None] & (columns < DIM_V)[None, :]
    tl.store(
        row_pointers(out, out_base, rows, columns, GROUP),
        round_to(acc * factor[:, None], out.pointer.dtype.element_ty),
        mask=inside,
    )
    if lse.pointer is not None:
        queries = (rows // GROUP).to(tl.int64) * lse.time + (rows % GROUP).to(tl.int64) * lse.head
        at = at_head(lse, batch, q_start, head * GROUP) + queries
        tl.store(at, logarithm, mask=rows < count)

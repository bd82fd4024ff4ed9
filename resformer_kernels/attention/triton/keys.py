"""Backward on a GPU, without atomics: the same bits from run to run.

`rows_kernel` first reduces dO and O to one number a row; `keys_gradient_kernel` keeps a tile of
keys and passes all rows by (dK, dV', coefficients); `queries_gradient_kernel` keeps a tile of rows
and passes all keys by (dQ). See README.md for the equations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels._triton.device import dot, exp, round_to, widen
from resformer_kernels.attention.triton.loads import (
    at_head,
    load_coefficient,
    load_keys,
    load_row_numbers,
    load_row_tile,
    row_slot,
    store_keys,
)
from resformer_kernels.attention.triton.tiles import (
    BOOLEAN,
    LOG2E,
    NO_BIAS,
    bias_tile,
    key_bounds,
    probabilities,
    row_tiles,
    scheduled,
    scores,
    sequence_of,
)

# How a coefficient's gradient leaves `keys_gradient_kernel`: as float32 sums of dV' * V in a fixed
# order, over the channels of each key, over the keys of each tile, or none at all.
NO_PARTIAL: tl.constexpr = tl.constexpr(0)
BY_KEY: tl.constexpr = tl.constexpr(1)
BY_COLUMN: tl.constexpr = tl.constexpr(2)
BY_ELEMENT: tl.constexpr = tl.constexpr(3)


@triton.jit(do_not_specialize=["q_len", "k_len"])
def rows_kernel(
    grad_out,
    out,
    lse,
    grad_lse,
    sinks,
    base,
    delta,
    sink_rows,
    cu_q,
    cu_k,
    q_len,
    k_len,
    heads,
    slots,
    tiles,
    DIM_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """delta = dO.O - dLSE of ROWS rows, the LSE in the unit of scores, and the sinks' summands."""
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    sequence = tl.program_id(0) // tiles // heads
    batch, q_start, _, q_len, _ = sequence_of(cu_q, cu_k, sequence, q_len, k_len, PACKED)
    rows = tile * ROWS + tl.arange(0, ROWS)
    count = q_len * GROUP
    there = rows < count
    gradient = load_row_tile(
        grad_out,
        None,
        batch,
        q_start,
        tile * ROWS,
        head,
        count,
        DIM_V,
        BLOCK_V,
        ROWS,
        GROUP,
        True,
        PACKED,
    )
    result = load_row_tile(
        out,
        None,
        batch,
        q_start,
        tile * ROWS,
        head,
        count,
        DIM_V,
        BLOCK_V,
        ROWS,
        GROUP,
        True,
        PACKED,
    )
    d = tl.sum(widen(gradient) * widen(result), 1)
    queries = (rows // GROUP).to(tl.int64)
    members = (rows % GROUP).to(tl.int64)
    if grad_lse.pointer is not None:
        at = at_head(grad_lse, batch, q_start, head * GROUP)
        at += queries * grad_lse.time + members * grad_lse.head
        d -= widen(tl.load(at, mask=there, other=0.0))
    at = at_head(lse, batch, q_start, head * GROUP) + queries * lse.time + members * lse.head
    logarithm = tl.load(at, mask=there, other=0.0)
    empty = logarithm == float("-inf")
    scaled = logarithm
    if not PRECISE:
        scaled = logarithm * LOG2E
    slot = row_slot(sequence, q_start, head, q_len, slots, GROUP, PACKED)
    tl.store(delta + slot + rows, d, mask=there)
    tl.store(base + slot + rows, tl.where(empty, 0.0, scaled), mask=there)
    if sink_rows.pointer is not None:
        # The sink is a score whose value is zero: dP = 0, so dS = -P delta.
        sink = widen(tl.load(sinks + head * GROUP + rows % GROUP))
        term = tl.where(empty, 0.0, -exp(sink - logarithm) * d)
        at = at_head(sink_rows, batch, q_start, head * GROUP)
        tl.store(at + queries * sink_rows.time + members * sink_rows.head, term, mask=there)


@triton.jit
def _write_value_gradient(
    gradient,
    out,
    descriptor,
    value,
    c,
    partial,
    batch,
    start,
    key,
    head,
    count,
    tile,
    heads,
    k_total,
    DIM_V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEYS: tl.constexpr,
    FORM: tl.constexpr,
    MIXES: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    """c dV' to one source of V', and the partial sums of dV' * value for c's gradient."""
    if out.pointer is not None:
        own = gradient
        if MIXES:
            own = gradient * load_coefficient(
                c, batch, start, key, head, count, DIM_V, BLOCK_V, KEYS, FORM
            )
        store_keys(own, out, descriptor, batch, start, key, head, count, DIM_V, BLOCK_V, KEYS)
    if PARTIAL != NO_PARTIAL:
        keys = key + tl.arange(0, KEYS)
        columns = tl.arange(0, BLOCK_V)
        inside = (keys < count)[:, None] & (columns < DIM_V)[None, :]
        v_tile = load_keys(
            value, None, batch, start, key, head, count, DIM_V, BLOCK_V, KEYS, True, False
        )
        terms = gradient * widen(v_tile)
        row = (tl.cast(batch, tl.int64) * k_total + start + keys) * heads + head
        if PARTIAL == BY_KEY:
            tl.store(partial + row, tl.sum(terms, 1), mask=keys < count)
        elif PARTIAL == BY_COLUMN:
            # Gradients of keys past `count` are of no key at all.
            terms = tl.where(inside, terms, 0.0)
            at = partial + (tl.cast(tile, tl.int64) * heads + head) * DIM_V
            tl.store(at + columns, tl.sum(terms, 0), mask=columns < DIM_V)
        else:
            tl.store(partial + row[:, None] * DIM_V + columns[None, :], terms, mask=inside)


@triton.jit(do_not_specialize=["q_len", "k_len", "window_left", "window_right"])
def keys_gradient_kernel(
    q,
    k,
    mixed,
    values,
    grad_out,
    base,
    delta,
    bias,
    listed,
    dk,
    dv,
    dv_first,
    grad_mixed,
    own_partial,
    first_partial,
    cu_q,
    cu_k,
    q_descriptor,
    grad_descriptor,
    base_descriptor,
    delta_descriptor,
    dk_descriptor,
    dv_descriptor,
    first_descriptor,
    q_len,
    k_len,
    k_total,
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
    OWN_FORM: tl.constexpr,
    FIRST_FORM: tl.constexpr,
    MIXES: tl.constexpr,
    OWN_PARTIAL: tl.constexpr,
    FIRST_PARTIAL: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    CAPPED: tl.constexpr,
    BIAS: tl.constexpr,
    RAW: tl.constexpr,
    PRECISE: tl.constexpr,
    PACKED: tl.constexpr,
    INDEX: tl.constexpr,
):
    """dK and dV' of one tile of keys, and what dV' is to v, v_first and the coefficients.

    `mixed` is V', `values` what it was mixed from.
    """
    tile, sequence_head = scheduled(tl.program_id(0), tiles, sequences * heads, section, False)
    head = sequence_head % heads
    sequence = sequence_head // heads
    batch, q_start, k_start, q_len, k_len = sequence_of(cu_q, cu_k, sequence, q_len, k_len, PACKED)
    first_key = tile * KEYS
    if first_key >= k_len:
        return
    keys = first_key + tl.arange(0, KEYS)
    # By pointers: the compiler keeps the left operand of a product in shared memory only where it
    # is a plain load. A tile of registers here would spill.
    k_tile = load_keys(
        k, None, batch, k_start, first_key, head, k_len, DIM_K, BLOCK_K, KEYS, True, False
    )
    v_tile = load_keys(
        mixed, None, batch, k_start, first_key, head, k_len, DIM_V, BLOCK_V, KEYS, True, False
    )

    count = q_len * GROUP
    shift = k_len - q_len
    begin, inner_begin, inner_end, end = row_tiles(
        first_key, tl.minimum(first_key + KEYS, k_len) - 1, shift, q_len, window_left,
        window_right, GROUP, ROWS, HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    if BIAS != NO_BIAS:
        inner_end = begin
    if BIAS == BOOLEAN:
        open_rows = listed + (tl.cast(sequence_head, tl.int64) * tiles + tile) * list_size
        inner_end = begin * 0
        end = tl.load(open_rows)
    slot = row_slot(sequence, q_start, head, q_len, slots, GROUP, PACKED)
    dk_tile = tl.zeros([KEYS, BLOCK_K], tl.float32)
    dv_tile = tl.zeros([KEYS, BLOCK_V], tl.float32)
    for phase in tl.static_range(2 if BIAS != NO_BIAS else 0 if HAS_RIGHT else 1, 3):
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
            first_row = step * ROWS
            if BIAS == BOOLEAN:
                first_row = tl.load(open_rows + 1 + step) * ROWS
            rows = first_row + tl.arange(0, ROWS)
            q_tile = load_row_tile(
                q, q_descriptor, batch, q_start, first_row, head, count, DIM_K, BLOCK_K, ROWS,
                GROUP, phase != 1, PACKED,
            )  # fmt: skip
            if PRECISE:
                # Summed in forward's order: a row with one key must find P = exp(s - LSE) = 1.
                product = dot(q_tile, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32))
                product = tl.trans(product)
            else:
                product = dot(k_tile, tl.trans(q_tile), tl.zeros([KEYS, ROWS], tl.float32))
            row_base = load_row_numbers(
                base, base_descriptor, slot, first_row, count, ROWS, phase != 1
            )
            lo, hi = key_bounds(
                rows, count, shift, k_len, window_left, window_right, GROUP, HAS_LEFT, HAS_RIGHT
            )
            bias_start, bias_offsets = bias_tile(bias, sequence, head, rows, GROUP, BIAS, INDEX)
            x, slope = scores(
                product, keys[:, None], lo[None, :], hi[None, :], bias, bias_start,
                bias_offsets[None, :], alpha, softcap, phase != 1, HAS_LEFT, CAPPED, BIAS, RAW,
                PRECISE, INDEX,
            )  # fmt: skip
            p = probabilities(x, row_base[None, :], alpha, RAW, PRECISE)
            grad_tile = load_row_tile(
                grad_out, grad_descriptor, batch, q_start, first_row, head, count, DIM_V, BLOCK_V,
                ROWS, GROUP, phase != 1, PACKED,
            )  # fmt: skip
            dv_tile = dot(round_to(p, grad_tile.dtype), grad_tile, dv_tile)
            dp = dot(v_tile, tl.trans(grad_tile), tl.zeros([KEYS, ROWS], tl.float32))
            row_delta = load_row_numbers(
                delta, delta_descriptor, slot, first_row, count, ROWS, phase != 1
            )
            ds = p * (dp - row_delta[None, :])
            if CAPPED:
                ds = ds * slope
            dk_tile = dot(round_to(ds, q_tile.dtype), q_tile, dk_tile)

    # Plus 0, as the compiler does not know: else it would keep the addresses of these keys in
    # registers throughout the loops, and spill.
    first_key += tl.minimum(end, 0)
    if dk.pointer is not None:
        store_keys(
            dk_tile * scale, dk, dk_descriptor, batch, k_start, first_key, head, k_len, DIM_K,
            BLOCK_K, KEYS,
        )  # fmt: skip
    if grad_mixed.pointer is not None:
        dv_tile += widen(
            load_keys(
                grad_mixed, None, batch, k_start, first_key, head, k_len, DIM_V, BLOCK_V, KEYS,
                True, False,
            )
        )  # fmt: skip
    place = sequence * tiles + tile
    _write_value_gradient(
        dv_tile, dv, dv_descriptor, values.v, values.own, own_partial, batch, k_start, first_key,
        head, k_len, place, heads, k_total, DIM_V, BLOCK_V, KEYS, OWN_FORM, MIXES, OWN_PARTIAL,
    )  # fmt: skip
    _write_value_gradient(
        dv_tile, dv_first, first_descriptor, values.v_first, values.first, first_partial, batch,
        k_start, first_key, head, k_len, place, heads, k_total, DIM_V, BLOCK_V, KEYS, FIRST_FORM,
        MIXES, FIRST_PARTIAL,
    )  # fmt: skip

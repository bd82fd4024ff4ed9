"""What the forward and the backward kernels share: where a tile lies, what it loads, its scores.

Rows are the queries of all heads that share a KV head: row r of KV head h is query r // GROUP of
head h * GROUP + r % GROUP. Kernels hold scores as (rows, keys) or transposed, so the functions here
take row quantities and keys already expanded to two axes, whichever way round.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels._triton.device import (
    exp,
    exp2,
    fast_tanh,
    tanh,
    widen,
)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# attn_bias, as kernels tell its kinds apart.
NO_BIAS: tl.constexpr = tl.constexpr(0)
BOOLEAN: tl.constexpr = tl.constexpr(1)
ADDITIVE: tl.constexpr = tl.constexpr(2)


@triton.jit
def scheduled(program, tiles, heads, section, HEAVY_LAST: tl.constexpr):
    """(tile, head) of a program: `section` heads at a time, all their tiles before the next heads.

    The keys of a section then stay in the second-level cache. Under a causal mask the last tiles
    have the most keys and start first, so that no long tile is left over at the end.
    """
    in_section = section * tiles
    first = program // in_section * section
    rest = program % in_section
    count = tl.minimum(section, heads - first)
    tile = rest // count
    if HEAVY_LAST:
        tile = tiles - 1 - tile
    return tile, first + rest % count


@triton.jit
def sequence_of(cu_q, cu_k, sequence, q_len, k_len, PACKED: tl.constexpr):
    """(batch entry of the tensors, first query, first key, queries, keys) of a sequence."""
    if PACKED:
        q_start = tl.load(cu_q + sequence)
        k_start = tl.load(cu_k + sequence)
        q_count = tl.load(cu_q + sequence + 1) - q_start
        k_count = tl.load(cu_k + sequence + 1) - k_start
        batch = sequence * 0
    else:
        q_start = sequence * 0
        k_start = sequence * 0
        q_count = q_len
        k_count = k_len
        batch = sequence
    return batch, q_start, k_start, q_count, k_count


@triton.jit
def key_bounds(
    rows,
    count,
    shift,
    k_len,
    window_left,
    window_right,
    GROUP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """The keys [lo, hi) that each row may see by position; shift is k_len - q_len."""
    queries = rows // GROUP
    lo = queries * 0
    hi = tl.where(rows < count, k_len, 0)
    if HAS_RIGHT:
        hi = tl.minimum(hi, queries + (shift + window_right + 1))
    if HAS_LEFT:
        lo = queries + (shift - window_left)
    return lo, hi


@triton.jit
def key_tiles(
    first_row,
    last_row,
    shift,
    k_len,
    window_left,
    window_right,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """(begin, inner begin, inner end, end) of the tiles of KEYS keys that rows [first, last] see.

    Every row sees all of the inner tiles, whose scores need no mask.
    """
    first = first_row // GROUP + shift
    last = last_row // GROUP + shift
    begin = first * 0
    inner_begin = begin
    inner_end = k_len // KEYS
    end = tl.cdiv(k_len, KEYS)
    if HAS_RIGHT:
        inner_end = tl.minimum(k_len, tl.maximum(first + window_right + 1, 0)) // KEYS
        end = tl.cdiv(tl.minimum(k_len, tl.maximum(last + window_right + 1, 0)), KEYS)
    if HAS_LEFT:
        begin = tl.maximum(first - window_left, 0) // KEYS
        inner_begin = tl.cdiv(tl.maximum(last - window_left, 0), KEYS)
        inner_begin = tl.maximum(tl.minimum(inner_begin, end), begin)
    inner_end = tl.maximum(inner_end, inner_begin)
    return begin, inner_begin, inner_end, end


@triton.jit
def bias_tile(
    bias, sequence, head, rows, GROUP: tl.constexpr, BIAS: tl.constexpr, INDEX: tl.constexpr
):
    """(start, offsets of rows from it) in attn_bias of a sequence and KV head, at key 0."""
    if BIAS == NO_BIAS:
        start = tl.cast(sequence, tl.int64)
        offsets = rows
    else:
        first_head = tl.cast(head * GROUP, tl.int64)
        start = tl.cast(sequence, tl.int64) * bias.batch + first_head * bias.head
        offsets = (rows // GROUP).to(INDEX) * bias.query + (rows % GROUP).to(INDEX) * bias.head
    return start, offsets


@triton.jit
def scores(
    product,
    keys,
    lo,
    hi,
    bias,
    bias_start,
    bias_offsets,
    alpha,
    softcap,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    CAPPED: tl.constexpr,
    BIAS: tl.constexpr,
    RAW: tl.constexpr,
    PRECISE: tl.constexpr,
    INDEX: tl.constexpr,
):
    """(scores, the softcap's slope), from the product q.k: all operands have two axes.

    scale, softcap, bias and mask, in that order. The unit is natural where PRECISE, else log2.
    alpha is the scale, over softcap where CAPPED and in the unit where neither softcap nor bias
    follows. RAW scores are yet to be multiplied by it.
    """
    slope = 1.0
    x = product
    if CAPPED:
        if PRECISE:
            x, slope = tanh(x * alpha)
        else:
            x, slope = fast_tanh(x * alpha)
        x = x * softcap
    elif not RAW:
        x = x * alpha
    inside = keys < hi
    if HAS_LEFT:
        inside = inside & (keys >= lo)
    if BIAS != NO_BIAS:
        place = bias_offsets + keys.to(INDEX) * bias.key
        seen = tl.load(bias.pointer + bias_start + place, mask=inside, other=0)
        if BIAS == ADDITIVE:
            x = x + widen(seen)
        else:
            inside = inside & (seen != 0)
    if (CAPPED or BIAS == ADDITIVE) and not PRECISE:
        x = x * LOG2E
    if MASKED or BIAS != NO_BIAS:
        x = tl.where(inside, x, float("-inf"))
    return x, slope


@triton.jit
def probabilities(x, base, alpha, RAW: tl.constexpr, PRECISE: tl.constexpr):
    """exp(scores - base) for scores and a base in the same unit."""
    if PRECISE:
        p = exp(x - base)
    elif RAW:
        p = exp2(x * alpha - base)
    else:
        p = exp2(x - base)
    return p


@triton.jit
def softmax_step(x, peak, total, acc, alpha, RAW: tl.constexpr, PRECISE: tl.constexpr):
    """(exp(x - peak), and the running peak, total and acc rescaled to a peak that x is part of).

    x (rows, keys) are scores; acc is yet to gain the product of the first and the values.
    """
    top = tl.max(x, 1)
    if RAW:
        top = top * alpha
    higher = tl.maximum(peak, top)
    # A row that has seen no key yet has no maximum; 0 stands in for it.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = probabilities(x, base[:, None], alpha, RAW, PRECISE)
    shrink = probabilities(peak, base, alpha, False, PRECISE)
    return p, higher, total * shrink + tl.sum(p, 1), acc * shrink[:, None]


@triton.jit
def close_rows(peak, total, sinks, heads, alpha, PRECISE: tl.constexpr, WANTS_LSE: tl.constexpr):
    """(what acc is to be multiplied by, the natural LSE) of rows whose keys have all been seen.

    `sinks` may be None; `heads` are the query heads of the rows.
    """
    # The sink is one more score, whose value is zero.
    weight = tl.full(peak.shape, 1.0, tl.float32)
    if sinks is not None:
        sink = widen(tl.load(sinks + heads))
        if not PRECISE:
            sink = sink * LOG2E
        top = tl.maximum(peak, sink)
        base = tl.where(top == float("-inf"), 0.0, top)
        weight = probabilities(peak, base, alpha, False, PRECISE)
        total = total * weight + probabilities(sink, base, alpha, False, PRECISE)
        peak = top
    empty = total == 0.0
    factor = tl.where(empty, 0.0, tl.math.div_rn(weight, total))
    logarithm = peak
    if WANTS_LSE:
        if PRECISE:
            # Backward takes exp of this: a rounding error here is one of a whole row.
            logarithm = (peak.to(tl.float64) + tl.log(total.to(tl.float64))).to(tl.float32)
        else:
            logarithm = (peak + tl.log2(total)) * LN2
        logarithm = tl.where(empty, float("-inf"), logarithm)
    return factor, logarithm


@triton.jit
def row_tiles(
    first_key,
    last_key,
    shift,
    q_len,
    window_left,
    window_right,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """(begin, inner begin, inner end, end) of the tiles of ROWS rows that see keys [first, last].

    Every row of the inner tiles is there and sees all of the keys.
    """
    begin = first_key * 0
    inner_begin = begin
    inner_end = q_len * GROUP // ROWS
    end = tl.cdiv(q_len * GROUP, ROWS)
    if HAS_LEFT:
        inner_end = tl.maximum(tl.minimum(q_len, first_key - shift + window_left + 1), 0)
        inner_end = inner_end * GROUP // ROWS
        end = tl.maximum(tl.minimum(q_len, last_key - shift + window_left + 1), 0)
        end = tl.cdiv(end * GROUP, ROWS)
    if HAS_RIGHT:
        begin = tl.maximum(first_key - shift - window_right, 0) * GROUP // ROWS
        inner_begin = tl.cdiv(tl.maximum(last_key - shift - window_right, 0) * GROUP, ROWS)
        inner_begin = tl.maximum(tl.minimum(inner_begin, end), begin)
    inner_end = tl.maximum(inner_end, inner_begin)
    return begin, inner_begin, inner_end, end


@triton.jit(do_not_specialize=["q_len", "k_len", "window_left", "window_right"])
def open_tiles_kernel(
    bias,
    listed,
    cu_q,
    cu_k,
    q_len,
    k_len,
    heads,
    outer_tiles,
    list_size,
    window_left,
    window_right,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    INDEX: tl.constexpr,
    BY_ROWS: tl.constexpr,
):
    """For a tile of rows, the tiles of keys in which a boolean mask lets any row see any key.

    Not BY_ROWS: for a tile of keys, those tiles of rows. listed (sequence, head, outer tile,
    list_size) receives their number and then their indices.
    """
    outer = tl.program_id(0) % outer_tiles
    sequence_head = tl.program_id(0) // outer_tiles
    head = sequence_head % heads
    sequence = sequence_head // heads
    _, _, _, q_len, k_len = sequence_of(cu_q, cu_k, sequence, q_len, k_len, PACKED)
    count = q_len * GROUP
    shift = k_len - q_len
    at = listed + tl.cast(tl.program_id(0), tl.int64) * list_size
    if BY_ROWS:
        last = tl.minimum(outer * ROWS + ROWS, count) - 1
        begin, _, _, end = key_tiles(
            outer * ROWS, last, shift, k_len, window_left, window_right, GROUP, KEYS, HAS_LEFT,
            HAS_RIGHT,
        )  # fmt: skip
        empty = outer * ROWS >= count
    else:
        last = tl.minimum(outer * KEYS + KEYS, k_len) - 1
        begin, _, _, end = row_tiles(
            outer * KEYS, last, shift, q_len, window_left, window_right, GROUP, ROWS, HAS_LEFT,
            HAS_RIGHT,
        )  # fmt: skip
        empty = outer * KEYS >= k_len
    end = tl.where(empty, begin, end)
    found = begin * 0
    for step in tl.range(begin, end):
        if BY_ROWS:
            rows = outer * ROWS + tl.arange(0, ROWS)
            keys = step * KEYS + tl.arange(0, KEYS)
        else:
            rows = step * ROWS + tl.arange(0, ROWS)
            keys = outer * KEYS + tl.arange(0, KEYS)
        lo, hi = key_bounds(
            rows, count, shift, k_len, window_left, window_right, GROUP, HAS_LEFT, HAS_RIGHT
        )
        inside = (keys[None, :] < hi[:, None]) & (keys[None, :] >= lo[:, None])
        start, offsets = bias_tile(bias, sequence, head, rows, GROUP, BOOLEAN, INDEX)
        place = offsets[:, None] + keys.to(INDEX)[None, :] * bias.key
        seen = tl.load(bias.pointer + start + place, mask=inside, other=0)
        is_open = tl.max(tl.max((seen != 0).to(tl.int32), 1), 0)
        tl.store(at + 1 + found, step, mask=is_open != 0)
        found += is_open
    tl.store(at, found)

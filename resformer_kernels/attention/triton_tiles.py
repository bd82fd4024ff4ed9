"""What the forward and the backward kernels share: where a tile lies, what it loads, its scores.

Rows are the queries of all heads that share a KV head: row r of KV head h is query r // GROUP of
head h * GROUP + r % GROUP. Kernels hold scores as (rows, keys) or transposed, so the functions here
take row quantities and keys already expanded to two axes, whichever way round.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels._triton_lib import (
    NUMBER,
    coefficient,
    exp,
    exp2,
    fast_tanh,
    mix,
    round_to,
    tanh,
    widen,
)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# attn_bias, as kernels tell its kinds apart.
NO_BIAS: tl.constexpr = tl.constexpr(0)
BOOLEAN: tl.constexpr = tl.constexpr(1)
ADDITIVE: tl.constexpr = tl.constexpr(2)

ROW_SLOT: tl.constexpr = tl.constexpr(128)


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
def at_head(view, batch, time, head):
    """Where (batch, time, head) lies in memory, in 64 bits."""
    offset = tl.cast(batch, tl.int64) * view.batch + tl.cast(time, tl.int64) * view.time
    return view.pointer + (offset + tl.cast(head, tl.int64) * view.head)


@triton.jit
def row_slot(sequence, q_start, head, q_len, slots, GROUP: tl.constexpr, PACKED: tl.constexpr):
    """Where backward keeps its numbers of a KV head's rows, one after the other, in (heads, slots).

    At multiples of ROW_SLOT, which descriptors want and which any tile of rows divides.
    """
    if PACKED:
        before = q_start
    else:
        before = sequence * q_len
    first = (before * GROUP + sequence * ROW_SLOT) // ROW_SLOT * ROW_SLOT
    return head * slots + first


@triton.jit
def load_row_numbers(
    numbers, descriptor, slot, first_row, count, ROWS: tl.constexpr, MASKED: tl.constexpr
):
    """One number each of ROWS rows from first_row on; zero from `count` on where MASKED."""
    rows = first_row + tl.arange(0, ROWS)
    if descriptor is None:
        found = tl.load(numbers + slot + rows, mask=rows < count, other=0.0)
    else:
        found = descriptor.load([slot + first_row])
        if MASKED:
            found = tl.where(rows < count, found, 0.0)
    return found


@triton.jit
def row_pointers(view, base, rows, columns, GROUP: tl.constexpr):
    """Pointers to a tile of rows; `base` is the first query of the KV head's first head."""
    queries = (rows // GROUP).to(tl.int64) * view.time + (rows % GROUP).to(tl.int64) * view.head
    return base + queries[:, None] + columns[None, :]


@triton.jit
def load_rows(pointers, rows, count, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile, zero in rows from `count` on and columns from WIDTH on."""
    if WIDTH == BLOCK:
        tile = tl.load(pointers, mask=(rows < count)[:, None], other=0.0)
    else:
        inside = (rows < count)[:, None] & (columns < WIDTH)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit
def load_row_tile(
    view,
    descriptor,
    batch,
    start,
    first_row,
    head,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """ROWS rows of KV head `head`, from first_row on; zero from `count` on where MASKED."""
    rows = first_row + tl.arange(0, ROWS)
    if descriptor is not None:
        at = [batch, start + first_row // GROUP, head, 0, 0]
        tile = descriptor.load(at).reshape(ROWS, BLOCK)
        if MASKED and PACKED:
            tile = tl.where((rows < count)[:, None], tile, tl.zeros_like(tile))
    else:
        columns = tl.arange(0, BLOCK)
        base = at_head(view, batch, start, head * GROUP)
        pointers = row_pointers(view, base, rows, columns, GROUP)
        if MASKED:
            tile = load_rows(pointers, rows, count, columns, WIDTH, BLOCK)
        elif WIDTH == BLOCK:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def load_keys(
    view,
    descriptor,
    batch,
    start,
    key,
    head,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """KEYS keys (or values) from `key` on of the sequence that begins at `start`.

    Where MASKED, what lies from `count` on is zero.
    """
    keys = key + tl.arange(0, KEYS)
    if descriptor is not None:
        tile = descriptor.load([batch, start + key, head, 0]).reshape(KEYS, BLOCK)
        if MASKED and PACKED:
            # The descriptor knows where the tensor ends, not where the sequence does.
            tile = tl.where((keys < count)[:, None], tile, tl.zeros_like(tile))
    else:
        columns = tl.arange(0, BLOCK)
        at = at_head(view, batch, start, head) + keys.to(tl.int64)[:, None] * view.time
        if MASKED:
            tile = load_rows(at + columns[None, :], keys, count, columns, WIDTH, BLOCK)
        elif WIDTH == BLOCK:
            tile = tl.load(at + columns[None, :])
        else:
            tile = tl.load(at + columns[None, :], mask=(columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_keys(
    tile,
    view,
    descriptor,
    batch,
    start,
    key,
    head,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write a tile of keys (or values), rounded to the tensor's dtype, as far as `count`."""
    rounded = round_to(tile, view.pointer.dtype.element_ty)
    if descriptor is not None:
        descriptor.store([batch, start + key, head, 0], rounded.reshape(1, KEYS, 1, BLOCK))
    else:
        keys = key + tl.arange(0, KEYS)
        columns = tl.arange(0, BLOCK)
        at = at_head(view, batch, start, head) + keys.to(tl.int64)[:, None] * view.time
        inside = (keys < count)[:, None] & (columns < WIDTH)[None, :]
        tl.store(at + columns[None, :], rounded, mask=inside)


@triton.jit
def load_coefficient(
    c,
    batch,
    start,
    key,
    head,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    FORM: tl.constexpr,
):
    """A mixing coefficient over the tile that `load_keys` would load."""
    if FORM == NUMBER:
        found = c.number
    else:
        keys = key + tl.arange(0, KEYS)
        columns = tl.arange(0, BLOCK)
        base = at_head(c, batch, start, head)
        rows = keys.to(tl.int64)
        found = coefficient(
            base, c.number, rows, columns, c.time, c.column, keys < count, columns < WIDTH, FORM
        )
    return found


@triton.jit
def load_values(
    values,
    v_descriptor,
    first_descriptor,
    batch,
    start,
    key,
    head,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    OWN_FORM: tl.constexpr,
    FIRST_FORM: tl.constexpr,
    MIXES: tl.constexpr,
    MASKED: tl.constexpr,
    PACKED: tl.constexpr,
):
    """A tile of V', zero from `count` on where MASKED, whatever lies there."""
    if MIXES:
        own_tile = load_keys(
            values.v, v_descriptor, batch, start, key, head, count, WIDTH, BLOCK, KEYS, MASKED,
            False,
        )  # fmt: skip
        first_tile = load_keys(
            values.v_first, first_descriptor, batch, start, key, head, count, WIDTH, BLOCK, KEYS,
            MASKED, False,
        )  # fmt: skip
        own = load_coefficient(
            values.own, batch, start, key, head, count, WIDTH, BLOCK, KEYS, OWN_FORM
        )
        first = load_coefficient(
            values.first, batch, start, key, head, count, WIDTH, BLOCK, KEYS, FIRST_FORM
        )
        tile = mix(own, own_tile, first, first_tile, own_tile.dtype)
        if MASKED:
            # Not by the values alone: a coefficient may be infinite.
            inside = key + tl.arange(0, KEYS) < count
            tile = tl.where(inside[:, None], tile, tl.zeros_like(tile))
    else:
        tile = load_keys(
            values.v, v_descriptor, batch, start, key, head, count, WIDTH, BLOCK, KEYS, MASKED,
            PACKED,
        )  # fmt: skip
    return tile


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

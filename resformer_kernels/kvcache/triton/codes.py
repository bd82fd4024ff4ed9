"""What a cache holds, as kernels read and write it: plain numbers, int8 codes, or float8 codes.

Float8 goes through integers, the same on every architecture and in Triton's interpreter, which
round as torch does. A token and head has one scale, value = code * scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels._triton.device import round_to, widen

PLAIN: tl.constexpr = tl.constexpr(0)
INT8: tl.constexpr = tl.constexpr(1)
E4M3: tl.constexpr = tl.constexpr(2)
E5M2: tl.constexpr = tl.constexpr(3)


@triton.jit
def decoded(codes, dtype: tl.constexpr, STORED: tl.constexpr):
    """A tile of the cache in dtype, exactly: codes without their scales."""
    if STORED == PLAIN:
        found = codes
    elif STORED == INT8:
        found = round_to(codes.to(tl.float32), dtype)
    else:
        if STORED == E5M2:
            wide = (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            # The fields at float32's places; its exponents count from 120 lower.
            bits = codes.to(tl.uint32)
            wide = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
            wide = tl.where((bits & 0x7F) == 0x7F, float("nan"), wide * 1.329227995784916e36)
        found = round_to(wide, dtype)
    return found


@triton.jit
def _float8(x, STORED: tl.constexpr):
    """The bits of float32 x in float8, rounded to nearest even; |x| is at most the largest."""
    # e4m3 has 3 bits of a fraction and the bias 7, e5m2 has 2 and 15.
    DROPPED: tl.constexpr = 20 if STORED == E4M3 else 21
    BIAS: tl.constexpr = (127 - 7) << 3 if STORED == E4M3 else (127 - 15) << 2
    LEAST: tl.constexpr = 0.015625 if STORED == E4M3 else 6.103515625e-05
    # Between this and its double float32 counts in steps of the least number, 2^-9 or 2^-16.
    STEP: tl.constexpr = 16384.0 if STORED == E4M3 else 128.0
    STEP_BITS: tl.constexpr = 0x46800000 if STORED == E4M3 else 0x43000000
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    half: tl.constexpr = (1 << (DROPPED - 1)) - 1
    normal = ((size + half + ((size >> DROPPED) & 1)) >> DROPPED) - BIAS
    small = (tl.abs(x) + STEP).to(tl.uint32, bitcast=True) - STEP_BITS
    return (tl.where(tl.abs(x) < LEAST, small, normal) | sign).to(tl.uint8)


@triton.jit
def quantised(x, LARGEST: tl.constexpr, STORED: tl.constexpr):
    """(codes, float32 scales of rows) of x (rows, columns), symmetrically.

    A row that holds a NaN or an infinity has codes 0 and a scale that is one, as in the reference.
    """
    wide = widen(x)
    most = tl.max(tl.abs(wide), 1)
    most = tl.where(tl.max((wide != wide).to(tl.int32), 1) != 0, float("nan"), most)
    largest = tl.full(most.shape, LARGEST, tl.float32)
    inverse = tl.where(most > 0, tl.math.div_rn(largest, most), 0.0)
    scaled = wide * inverse[:, None]
    scaled = tl.where(scaled == scaled, scaled, 0.0)
    scaled = tl.minimum(tl.maximum(scaled, -LARGEST), LARGEST)
    if STORED == INT8:
        # Adding 1.5 * 2^23 rounds to the nearest even integer.
        codes = ((scaled + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        codes = _float8(scaled, STORED)
    return codes, tl.math.div_rn(most, largest)


@triton.jit
def page_of(table, sequence, keys, inside, pages, page_size):
    """(page, place in it) of keys of a sequence; `inside` is False too where no page is there."""
    place = keys % page_size
    at = (
        tl.cast(sequence, tl.int64) * table.sequence + (keys // page_size).to(tl.int64) * table.page
    )
    page = tl.load(table.pointer + at, mask=inside, other=0)
    return page, place, inside & (page >= 0) & (page < pages)


@triton.jit
def _append(
    cache,
    scale,
    new,
    batch,
    token,
    page,
    place,
    there,
    first_head,
    heads,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    LARGEST: tl.constexpr,
    STORED: tl.constexpr,
):
    rows = first_head + tl.arange(0, HEADS)
    columns = tl.arange(0, BLOCK)
    wanted = (rows < heads) & there
    mask = wanted[:, None] & (columns < WIDTH)[None, :]
    source = tl.cast(batch, tl.int64) * new.batch + tl.cast(token, tl.int64) * new.time
    read = source + rows.to(tl.int64)[:, None] * new.head + columns[None, :]
    x = tl.load(new.pointer + read, mask=mask, other=0.0)
    target = page.to(tl.int64) * cache.batch + place.to(tl.int64) * cache.time
    at = cache.pointer + target + rows.to(tl.int64)[:, None] * cache.head + columns[None, :]
    if STORED == PLAIN:
        tl.store(at, x, mask=mask)
    else:
        codes, scales = quantised(x, LARGEST, STORED)
        tl.store(at, codes, mask=mask)
        target = page.to(tl.int64) * scale.batch + place.to(tl.int64) * scale.time
        tl.store(scale.pointer + target + rows.to(tl.int64) * scale.head, scales, mask=wanted)


@triton.jit(do_not_specialize=["tokens", "capacity", "pages", "page_size"])
def append_kernel(
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    k,
    v,
    seqlens,
    table,
    tokens,
    capacity,
    pages,
    page_size,
    heads,
    head_tiles,
    DIM_K: tl.constexpr,
    DIM_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HEADS: tl.constexpr,
    LARGEST: tl.constexpr,
    STORED: tl.constexpr,
):
    """Some heads of one new token of a sequence, written after the `seqlens` that it has.

    What does not fit the capacity, or whose page does not exist, is written nowhere. k or v, and
    with them their caches, may be None.
    """
    program = tl.program_id(0)
    first_head = program % head_tiles * HEADS
    token = program // head_tiles % tokens
    sequence = program // head_tiles // tokens
    key = tl.load(seqlens + sequence) + token
    there = (key >= 0) & (key < capacity)
    if table.pointer is not None:
        page, place, there = page_of(table, sequence, key, there, pages, page_size)
    else:
        page = sequence
        place = key
    if k.pointer is not None:
        _append(
            k_cache, k_scale, k, sequence, token, page, place, there, first_head, heads, DIM_K,
            BLOCK_K, HEADS, LARGEST, STORED,
        )  # fmt: skip
    if v.pointer is not None:
        _append(
            v_cache, v_scale, v, sequence, token, page, place, there, first_head, heads, DIM_V,
            BLOCK_V, HEADS, LARGEST, STORED,
        )  # fmt: skip

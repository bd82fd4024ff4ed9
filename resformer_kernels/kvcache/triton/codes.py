"""Codes of a cache: plain numbers, int8 or float8, and their conversion.

Float8 is converted with integer arithmetic, the same on every architecture and in Triton's
interpreter, and rounded as torch does. A token and head has one scale: value = code * scale.
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
            # Fields moved to float32's bits; the factor 2^120 corrects the exponent's bias.
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
    # From STEP to its double, float32 is spaced by float8's least number, 2^-9 or 2^-16.
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

    The scale of a row with a NaN or an infinity is that, and its codes are 0, as in the reference.
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

"""Device functions that every Triton kernel shares.

Kernels are proved by Triton's interpreter, which differs from a GPU where INTERPRETED is asked:
there, bfloat16 products and arithmetic are garbage and rounding to bfloat16 truncates. A choice
by a constant needs if and else, with one return after both: the compiler follows every return.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)

# How a coefficient is read over a tile of V, (rows, head_dim): see `coefficient`.
NUMBER: tl.constexpr = tl.constexpr(0)
PER_TILE: tl.constexpr = tl.constexpr(1)
PER_ROW: tl.constexpr = tl.constexpr(2)
PER_COLUMN: tl.constexpr = tl.constexpr(3)
PER_ELEMENT: tl.constexpr = tl.constexpr(4)


@triton.jit
def let_next_start(DEPENDENT: tl.constexpr):
    """Let the next launch of the stream start, if it is one that calls `wait_for_last`."""
    if DEPENDENT and not INTERPRETED:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(DEPENDENT: tl.constexpr):
    """Wait until the stream's launch before this one has ended and its stores are seen.

    Of a kernel that is launched with `launch_pdl`, before it loads or stores anything.
    """
    if DEPENDENT and not INTERPRETED:
        gdc_wait()


@triton.jit
def widen(x):
    """x in float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x, rounded to the nearest dtype, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        # A NaN stays one even where its payload sits in the bits that go.
        kept = tl.where(x == x, nearest, bits | 0x00400000)
        rounded = (kept >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = x.to(dtype)
    return rounded


@triton.jit
def dot(a, b, acc):
    """a @ b + acc, accumulated in float32; float32 operands are not shortened to TF32."""
    if INTERPRETED:
        product = tl.dot(widen(a), widen(b), acc, input_precision="ieee")
    else:
        product = tl.dot(a, b, acc, input_precision="ieee")
    return product


@triton.jit
def product(a, b):
    """a * b, rounded before anything is added to it: for sums across the threads of a tile.

    Where compilers fuse one thread's product with another's rounded one, the threads that share a
    sum have different bits of it. Adding 0 makes a fused operation of the product itself.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def exp2(x):
    """2^x by the hardware's approximation, 2e-7: enough for what is then rounded to 16 bits."""
    return tl.exp2(x)


@triton.jit
def _reduced_exp(x):
    """(p, s) with e^x = s (1 + p): no cancellation near 0. For x in [-88, 88]; NaN in p."""
    # Adding 1.5 * 2^23 leaves the nearest integer n in the lowest bits of the sum.
    shifted = x * 1.44269504088896341 + 12582912.0
    n = shifted - 12582912.0
    r = tl.fma(n, -1.42860682030941723e-6, tl.fma(n, -0.693145751953125, x))
    p = tl.fma(r, 0.0013950602151453495, 0.008368954062461853)
    p = tl.fma(p, r, 0.04166620597243309)
    p = tl.fma(p, r, 0.166665181517601)
    p = tl.fma(p, r, 0.5)
    p = tl.fma(p * r, r, r)
    two_n = ((shifted.to(tl.uint32, bitcast=True) << 23) + 0x3F800000).to(tl.float32, bitcast=True)
    return p, two_n


@triton.jit
def exp(x):
    """e^x to an ulp, for x up to 88; 0 below 2^-126."""
    p, two_n = _reduced_exp(tl.where(x < -88.0, -88.0, x))
    return tl.fma(p, two_n, two_n)


@triton.jit
def tanh(x):
    """(tanh x, its slope). Neither cancels: tanh is relatively exact near 0, its slope near 1."""
    y = 2.0 * x
    y = tl.where(y > 21.0, 21.0, tl.where(y < -21.0, -21.0, y))
    p, two_n = _reduced_exp(y)
    whole = tl.fma(p, two_n, two_n)
    below = whole + 1.0
    minus_one = tl.fma(p, two_n, two_n - 1.0)
    return tl.math.div_rn(minus_one, below), 4.0 * tl.math.div_rn(whole, below * below)


@triton.jit
def fast_tanh(x):
    """(tanh x, its slope), to 2e-7: enough for scores whose inputs have 16 bits."""
    t = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
    return t, 1.0 - t * t


@triton.jit
def coefficient(
    pointer,
    number,
    rows,
    columns,
    row_stride,
    column_stride,
    row_mask,
    column_mask,
    FORM: tl.constexpr,
):
    """A mixing coefficient over a tile, in float32 and a shape that broadcasts to it.

    `pointer` is at the tile's batch entry and head; rows (R,) int64 and columns (C,) count from
    there. FORM: NUMBER is `number`; the others are read once, per row, per column or per element,
    as the tensor's strides of 0 allow. Outside the masks nothing is read and the result is 0.
    """
    if FORM == NUMBER:
        found = number
    elif FORM == PER_TILE:
        found = widen(tl.load(pointer))
    elif FORM == PER_ROW:
        at = pointer + rows * row_stride
        found = widen(tl.load(at, mask=row_mask, other=0.0))[:, None]
    elif FORM == PER_COLUMN:
        at = pointer + columns * column_stride
        found = widen(tl.load(at, mask=column_mask, other=0.0))[None, :]
    else:
        at = pointer + rows[:, None] * row_stride + columns[None, :] * column_stride
        mask = row_mask[:, None] & column_mask[None, :]
        found = widen(tl.load(at, mask=mask, other=0.0))
    return found


@triton.jit
def mix(own, v, first, v_first, dtype: tl.constexpr):
    """V' = own v + first v_first, in float32 and rounded once.

    The same bits wherever it is inlined: the addition is fused explicitly, with this product.
    """
    return round_to(tl.fma(first, widen(v_first), own * widen(v)), dtype)

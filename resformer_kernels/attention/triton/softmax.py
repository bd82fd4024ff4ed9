"""Scores, and the running softmax over them: what every kernel over scores shares.

Kernels hold scores as (rows, keys) or transposed, so `scores` takes what it knows of rows and keys
already expanded to two axes, whichever way round.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from resformer_kernels._triton.device import exp, exp2, fast_tanh, tanh, widen

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# Kinds of attn_bias.
NO_BIAS: tl.constexpr = tl.constexpr(0)
BOOLEAN: tl.constexpr = tl.constexpr(1)
ADDITIVE: tl.constexpr = tl.constexpr(2)


class Seen(NamedTuple):
    """What each row may see, and where its bias lies: for each row, expanded to two axes."""

    lo: Any
    hi: Any
    """Keys [lo, hi), by position."""
    bias_start: Any
    bias_offsets: Any
    """Offset of key 0 in attn_bias, from `bias_start`."""


@triton.jit
def scores(product, keys, seen, scoring, MASKED: tl.constexpr):
    """(scores, the softcap's slope), from the product q.k: all operands have two axes.

    scale, softcap, bias and mask, in that order. The unit is natural where NATURAL, else log2.
    alpha is the scale, over softcap where CAPPED and in the unit where neither softcap nor bias
    follows. RAW scores are not multiplied by alpha yet.
    """
    slope = 1.0
    x = product
    if scoring.CAPPED:
        if scoring.PRECISE:
            x, slope = tanh(x * scoring.alpha)
        else:
            x, slope = fast_tanh(x * scoring.alpha)
        x = x * scoring.softcap
    elif not scoring.RAW:
        x = x * scoring.alpha
    inside = keys < seen.hi
    if scoring.HAS_LEFT:
        inside = inside & (keys >= seen.lo)
    if scoring.BIAS != NO_BIAS:
        place = seen.bias_offsets + keys.to(scoring.INDEX) * scoring.bias.key
        bias = tl.load(scoring.bias.pointer + seen.bias_start + place, mask=inside, other=0)
        if scoring.BIAS == ADDITIVE:
            x = x + widen(bias)
        else:
            inside = inside & (bias != 0)
    if scoring.CAPPED and not scoring.NATURAL:
        x = x * LOG2E
    if MASKED or scoring.BIAS != NO_BIAS:
        x = tl.where(inside, x, float("-inf"))
    return x, slope


@triton.jit
def exponential(x, PRECISE: tl.constexpr, NATURAL: tl.constexpr = False):
    """exp(x), for x in the unit of scores."""
    if PRECISE:
        p = exp(x)
    elif NATURAL:
        p = exp2(x * LOG2E)
    else:
        p = exp2(x)
    return p


@triton.jit
def probabilities(x, base, rest, scoring):
    """exp(scores - base - rest), both in the unit of scores; `rest` counts under an additive bias
    alone."""
    if scoring.RAW:
        x = x * scoring.alpha
    x = x - base
    if scoring.BIAS == ADDITIVE:
        x = x - rest
    return exponential(x, scoring.PRECISE, scoring.NATURAL)


@triton.jit
def softmax_step(x, peak, total, acc, scoring):
    """(exp(x - peak), and the running peak, total and acc rescaled to a peak that x is part of).

    x (rows, keys) are scores; acc has yet to gain the product of the first result and the values.
    """
    top = tl.max(x, 1)
    if scoring.RAW:
        top = top * scoring.alpha
    higher = tl.maximum(peak, top)
    # A row that has seen no key yet has no maximum; 0 stands in for it.
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = probabilities(x, base[:, None], 0.0, scoring)
    shrink = exponential(peak - base, scoring.PRECISE, scoring.NATURAL)
    return p, higher, total * shrink + tl.sum(p, 1), acc * shrink[:, None]


@triton.jit
def close_rows(peak, total, sinks, heads, PRECISE: tl.constexpr, NATURAL: tl.constexpr = False):
    """(the factor that normalises acc, the natural LSE) of rows whose keys have all been seen.

    `sinks` may be None; `heads` are the query heads of the rows.
    """
    # The sink is one more score, whose value is zero.
    weight = tl.full(peak.shape, 1.0, tl.float32)
    nothing = tl.full(peak.shape, float("-inf"), tl.float32)
    if sinks is not None:
        sink = widen(tl.load(sinks + heads))
        # The LSE of a row without keys, even where it is too low for log2.
        nothing = sink
        if not (PRECISE or NATURAL):
            sink = sink * LOG2E
        top = tl.maximum(peak, sink)
        base = tl.where(top == float("-inf"), 0.0, top)
        weight = exponential(peak - base, PRECISE, NATURAL)
        total = total * weight + exponential(sink - base, PRECISE, NATURAL)
        peak = top
    empty = total == 0.0
    factor = tl.where(empty, 0.0, tl.math.div_rn(weight, total))
    if PRECISE:
        # Backward takes exp of this: a rounding error here is one of a whole row.
        logarithm = (peak.to(tl.float64) + tl.log(total.to(tl.float64))).to(tl.float32)
    elif NATURAL:
        logarithm = peak + tl.log2(total) * LN2
    else:
        logarithm = (peak + tl.log2(total)) * LN2
    return factor, tl.where(empty, nothing, logarithm)

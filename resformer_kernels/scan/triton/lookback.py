"""The state that enters each chunk of a scan, told from program to program in one launch.

A program publishes what its chunk does to a state (a product and a sum) and looks back at what
those before it published. What it combines, and in which order, follows from its chunk's number
alone, never from who was quick: WINDOW chunks make a window, whose last one publishes the state
after it; any other combines the chunks before it in its window, then takes the last window's state.

Protocol. Programs share 64-bit words, zero before the launch: a float32 in the lower half, a flag
in the upper one, 0 until the word is published. Each word is stored once, by an atomic exchange,
and loaded as a whole by volatile loads, so that value and flag come together; no word says anything
about other memory, hence no fence, barrier or order of words is needed. No program loads a word
that it stores. Copies of a channel in several threads could see a word at different times: tiles
have a thread for each channel at least. A program takes its chunk's number from a ticket, so that
it waits only for programs that run or are over.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels.scan.triton import steps

PRODUCT: tl.constexpr = tl.constexpr(0)
END: tl.constexpr = tl.constexpr(1)
HEADER: tl.constexpr = tl.constexpr(2)
"""Words before those of chunks: the ticket, and one that aligns."""
RESET: tl.constexpr = tl.constexpr(2)
"""The flag of a chunk in which a sequence begins, so that the entering state is lost; else 1."""


def new_words(like: Tensor, programs: int, work: steps.Work) -> Tensor | None:
    """Words of one launch: a product and a sum for each chunk; None where time is not split."""
    if work.chunks == 1:
        return None
    width = work.width * (2 if like.is_complex() else 1)
    count = 2 * (programs // work.column_tiles) * width
    return like.new_zeros((HEADER.value + count,), dtype=torch.int64)


@triton.jit
def _words_at(words, work, place, index, KIND: tl.constexpr):
    parts: tl.constexpr = 2 if work.COMPLEX else 1
    row = (2 * index.to(tl.int64) + KIND) * work.width * parts
    return words + HEADER + row + place.columns * parts


@triton.jit
def _word_of(value, flag):
    return (value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (flag << 32)


@triton.jit
def _publish(words, work, place, KIND: tl.constexpr, value, flag, wanted):
    at = _words_at(words, work, place, place.index, KIND)
    mask = place.mask & wanted
    tl.atomic_xchg(at, _word_of(value[0], flag), mask=mask, sem="relaxed")
    if work.COMPLEX:
        tl.atomic_xchg(at + 1, _word_of(value[1], flag), mask=mask, sem="relaxed")


@triton.jit
def _look(words, work, place, index, KIND: tl.constexpr, wanted):
    """(value, flag) of a chunk; the flag is 1 where nothing is wanted."""
    at = _words_at(words, work, place, index, KIND)
    mask = place.mask & wanted
    word = tl.load(at, mask=mask, other=1 << 32, volatile=True)
    re = word.to(tl.int32).to(tl.float32, bitcast=True)
    im = re
    flag = word >> 32
    if work.COMPLEX:
        word = tl.load(at + 1, mask=mask, other=1 << 32, volatile=True)
        im = word.to(tl.int32).to(tl.float32, bitcast=True)
        flag = tl.minimum(flag, word >> 32)
    return (re, im), flag


@triton.jit
def _through(product, end, lost, h, COMPLEX: tl.constexpr):
    """product * h + end. A product that overflowed does not affect a state of zero."""
    lost = lost | ((h[0] == 0.0) & (h[1] == 0.0) if COMPLEX else h[0] == 0.0)
    return steps.select(lost, end, steps.fma(product, h, end, COMPLEX))


@triton.jit
def _window(words, work, place, behind):
    """(product, end, whether the state is lost) of the `behind` chunks before this one, AT_ONCE of
    which are looked at together: each takes registers beside the steps that were loaded."""
    end = steps.zeros(place)
    product = (end[0] + 1.0, end[1])
    lost = tl.zeros(place.columns.shape, tl.int1)
    AT_ONCE: tl.constexpr = 3 if work.COMPLEX else 2 if work.packing.kinds is not None else 4
    for base in range(0, behind, AT_ONCE):
        end_after, product_after, lost_after = end, product, lost
        waiting = 1
        while waiting > 0:
            seen = ()
            for u in tl.static_range(AT_ONCE):
                index, wanted = place.index - behind + base + u, base + u < behind
                seen += _look(words, work, place, index, PRODUCT, wanted)
                seen += _look(words, work, place, index, END, wanted)
            end_after, product_after, lost_after = end, product, lost
            missing = tl.zeros(place.columns.shape, tl.int1)
            for u in tl.static_range(AT_ONCE):
                flag, exists = seen[4 * u + 1], base + u < behind
                resets = flag == RESET
                missing = missing | (flag == 0) | (seen[4 * u + 3] == 0)
                ended = _through(seen[4 * u], seen[4 * u + 2], resets, end_after, work.COMPLEX)
                end_after = steps.select(exists, ended, end_after)
                both = steps.fma(seen[4 * u], product_after, steps.zeros(place), work.COMPLEX)
                product_after = steps.select(exists, both, product_after)
                lost_after = lost_after | resets
            waiting = tl.max(missing.to(tl.int32), 0)
        end, product, lost = end_after, product_after, lost_after
    return product, end, lost


@triton.jit
def entering_state(words, first, product, end, reset, work, place):
    """(the state that enters this chunk, which turns a state into product * state + end, or into
    `end` where `reset`; zero). `first`: the state that enters the first chunk."""
    behind = place.number % work.WINDOW
    closes = behind == work.WINDOW - 1
    flag = 1 + tl.full((), 0, tl.int64) + reset
    _publish(words, work, place, PRODUCT, product, flag, closes == 0)
    _publish(words, work, place, END, end, flag, closes == 0)
    before, after, lost = _window(words, work, place, behind)
    h = first
    waiting = 1
    while waiting > 0:
        # The last window's chunks come before place.index - behind.
        later = place.number > behind
        state, flags = _look(words, work, place, place.index - behind - 1, END, later)
        h = steps.select(later, state, first)
        waiting = tl.max((flags == 0).to(tl.int32), 0)
    h = steps.select(behind > 0, _through(before, after, lost, h, work.COMPLEX), h)
    _publish(
        words, work, place, END, _through(product, end, reset != 0, h, work.COMPLEX), flag, closes
    )
    return h, waiting


@triton.jit
def summary(loaded, gate, entered, work, place, start, BACKWARD: tl.constexpr):
    """What loaded steps do to a state: (product, end, whether a sequence begins there). BACKWARD:
    for the recurrence c = conj(g) (x + c)."""
    h = steps.zeros(place)
    product = (h[0] + 1.0, h[1])
    reset = 0
    for u in tl.static_range(work.STEPS):
        step = steps.step_of(work, place, start + u)
        if work.packing.kinds is not None:
            h = steps.entered(entered, work, place, step, h)
            reset = tl.where(step.enters, 1, reset)
        x = loaded[2 * u]
        g = steps.gate_of(gate, loaded[2 * u + 1], step)
        if BACKWARD:
            h = steps.conj_mul(g, (h[0] + x[0], h[1] + x[1]), work.COMPLEX)
            product = steps.conj_mul(g, product, work.COMPLEX)
        else:
            h = steps.fma(g, h, x, work.COMPLEX)
            product = steps.fma(g, product, steps.zeros(place), work.COMPLEX)
    return product, h, reset


@triton.jit
def state_before(words, first, loaded, gate, entered, work, place, begin, BACKWARD: tl.constexpr):
    """(the state before the steps of a chunk that were loaded, `first` where time is not split;
    the number of its first step). The compiler does not know that number before the wait is over:
    addresses that it could compute earlier would take registers during the wait."""
    h = first
    start = begin
    if words is not None:
        product, end, reset = summary(loaded, gate, entered, work, place, begin, BACKWARD)
        h, zero = entering_state(words, first, product, end, reset, work, place)
        start = begin + zero
    return h, start

"""The Triton kernel that runs through the chunks of a scan, given what each does to a state."""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels.scan.triton.kernels import fma_of, keep, state_of


@triton.jit
def carry_kernel(
    products,
    ends,
    resets,
    entered,
    entering,
    width,
    chunks,
    column_tiles,
    COMPLEX: tl.constexpr,
    PACKED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state that enters each chunk of a track."""
    track = tl.program_id(0) // column_tiles
    columns = tl.program_id(0) % column_tiles * BLOCK + tl.arange(0, BLOCK)
    wide = columns < width
    hr, hi = state_of(None if PACKED else entered, track, width, columns, wide, COMPLEX)
    for start in range(0, chunks, STEPS):
        loaded = ()
        for u in tl.static_range(STEPS):
            mask = wide & (start + u < chunks)
            index = track * chunks + start + u
            loaded += state_of(products, index, width, columns, mask, COMPLEX)
            loaded += state_of(ends, index, width, columns, mask, COMPLEX)
        for u in tl.static_range(STEPS):
            there = start + u < chunks
            index = track * chunks + start + u
            keep(entering, index, width, columns, wide & there, hr, hi, COMPLEX)
            er, ei = loaded[4 * u + 2], loaded[4 * u + 3]
            nr, ni = fma_of(loaded[4 * u], loaded[4 * u + 1], hr, hi, er, ei, COMPLEX)
            # A product that overflowed does nothing to a state of zero.
            lost = hr == 0.0
            if COMPLEX:
                lost = lost & (hi == 0.0)
            if PACKED:
                lost = lost | (tl.load(resets + index, mask=there, other=0) != 0)
            hr, hi = tl.where(lost, er, nr), tl.where(lost, ei, ni)

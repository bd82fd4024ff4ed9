"""The Triton kernels of the scan.

A program has BLOCK channels of one chunk of steps of one track, and takes the steps one after
another: what is parallel is channels, tracks and chunks. A track is a batch entry, or all packed
rows, in which the state is replaced where a sequence begins. Steps i = 0, 1, ... are those in the
order in which a kernel visits them, whatever the rows' order in memory (REVERSED). STEPS of them
are loaded before the first is worked on. Pointers and strides come as the tuples of
`triton_launch.py`.

A value is a pair of tensors, its real and its imaginary part; of real numbers the first counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels._triton import device as lib

# What `Packing.kinds` says of a packed row.
INSIDE: tl.constexpr = tl.constexpr(1)
FIRST: tl.constexpr = tl.constexpr(2)
LAST: tl.constexpr = tl.constexpr(4)


@triton.jit
def _load(at, columns, mask, other, COMPLEX: tl.constexpr):
    """Channels of the row at `at` in float32; `other` (real) outside the mask."""
    if COMPLEX:
        count: tl.constexpr = 2 * columns.shape[0]
        pairs = tl.reshape(tl.join(2 * columns, 2 * columns + 1), (count,))
        both = tl.load(at + pairs, mask=tl.reshape(tl.join(mask, mask), (count,)), other=0.0)
        re, im = tl.split(tl.reshape(both, (columns.shape[0], 2)))
        re = tl.where(mask, re, other)
    else:
        re = lib.widen(tl.load(at + columns, mask=mask, other=other))
        im = re
    return re, im


@triton.jit
def _store(at, columns, mask, re, im, COMPLEX: tl.constexpr):
    if COMPLEX:
        count: tl.constexpr = 2 * columns.shape[0]
        pairs = tl.reshape(tl.join(2 * columns, 2 * columns + 1), (count,))
        both = tl.reshape(tl.join(re, im), (count,))
        tl.store(at + pairs, both, mask=tl.reshape(tl.join(mask, mask), (count,)))
    else:
        tl.store(at + columns, lib.round_to(re, at.dtype.element_ty), mask=mask)


@triton.jit
def state_of(rows, index, width, columns, mask, COMPLEX: tl.constexpr):
    """Row `index` of (rows, width) states; zeros where there are none."""
    if rows is not None:
        at = rows + index.to(tl.int64) * width * (2 if COMPLEX else 1)
        re, im = _load(at, columns, mask, 0.0, COMPLEX)
    else:
        re = tl.zeros(columns.shape, tl.float32)
        im = re
    return re, im


@triton.jit
def keep(rows, index, width, columns, mask, re, im, COMPLEX: tl.constexpr):
    """Row `index` of (rows, width) states becomes (re, im)."""
    at = rows + index.to(tl.int64) * width * (2 if COMPLEX else 1)
    _store(at, columns, mask, re, im, COMPLEX)


@triton.jit
def fma_of(ar, ai, br, bi, cr, ci, COMPLEX: tl.constexpr):
    """a * b + c."""
    if COMPLEX:
        re = tl.fma(ar, br, tl.fma(-ai, bi, cr))
        im = tl.fma(ar, bi, tl.fma(ai, br, ci))
    else:
        re = tl.fma(ar, br, cr)
        im = re
    return re, im


@triton.jit
def _conj_mul(ar, ai, br, bi, COMPLEX: tl.constexpr):
    """conj(a) * b."""
    if COMPLEX:
        re = tl.fma(ar, br, ai * bi)
        im = tl.fma(ar, bi, -ai * br)
    else:
        re = ar * br
        im = re
    return re, im


@triton.jit
def _place(time, width, chunk, chunks, column_tiles, BLOCK: tl.constexpr):
    """(track, chunk, its first step, the step after its last, columns, their mask)."""
    program = tl.program_id(0)
    columns = program % column_tiles * BLOCK + tl.arange(0, BLOCK)
    number = program // column_tiles % chunks
    begin = number * chunk
    track = program // column_tiles // chunks
    return track, number, begin, min(begin + chunk, time), columns, columns < width


@triton.jit
def _row(i, time, REVERSED: tl.constexpr):
    # A step may be a number of Python's in the interpreter.
    return tl.full((), 0, tl.int64) + (time - 1 - i if REVERSED else i)


@triton.jit
def _kind(packing, row, there, PACKED: tl.constexpr, REVERSED: tl.constexpr):
    """(whether the row is inside a sequence, its first to be visited, its last; which that is)."""
    if PACKED:
        kind = tl.load(packing.kinds + row, mask=there, other=0)
        owner = tl.load(packing.owners + row, mask=there, other=0)
        inside = (kind & INSIDE) != 0
        enters = (kind & (LAST if REVERSED else FIRST)) != 0
        leaves = (kind & (FIRST if REVERSED else LAST)) != 0
    else:
        inside = there
        enters = False
        leaves = False
        owner = row
    return inside, enters, leaves, owner


@triton.jit
def _operands(view, track, row, columns, mask, other, THERE: tl.constexpr, COMPLEX: tl.constexpr):
    """The row of a tensor of tokens' shape; without one (THERE is false), zeros."""
    if THERE:
        at = view.pointer + track.to(tl.int64) * view.track + row * view.time
        re, im = _load(at, columns, mask, other, COMPLEX)
    else:
        re = tl.zeros(columns.shape, tl.float32)
        im = re
    return re, im


@triton.jit
def forward_kernel(
    gates,
    tokens,
    states,
    entering,
    initial,
    final,
    packing,
    time,
    width,
    chunk,
    chunks,
    column_tiles,
    COMPLEX: tl.constexpr,
    CONSTANT: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h = g h + x. `entering`: the state before each chunk, where there are several."""
    track, number, begin, end, columns, wide = _place(
        time, width, chunk, chunks, column_tiles, BLOCK
    )
    if entering is not None:
        hr, hi = state_of(entering, track * chunks + number, width, columns, wide, COMPLEX)
    else:
        hr, hi = state_of(None if PACKED else initial, track, width, columns, wide, COMPLEX)
    if CONSTANT:
        cr, ci = _load(gates.pointer, columns, wide, 0.0, COMPLEX)
    for start in range(begin, end, STEPS):
        loaded = ()
        for u in tl.static_range(STEPS):
            row = _row(start + u, time, REVERSED)
            inside, _, _, _ = _kind(packing, row, start + u < end, PACKED, REVERSED)
            mask = wide & inside
            xr, xi = _operands(tokens, track, row, columns, mask, 0.0, True, COMPLEX)
            gr, gi = _operands(gates, track, row, columns, mask, 1.0, not CONSTANT, COMPLEX)
            loaded += (xr, xi, gr, gi)
        for u in tl.static_range(STEPS):
            there = start + u < end
            row = _row(start + u, time, REVERSED)
            inside, enters, leaves, owner = _kind(packing, row, there, PACKED, REVERSED)
            if PACKED:
                er, ei = state_of(initial, owner, width, columns, wide & enters, COMPLEX)
                hr, hi = tl.where(enters, er, hr), tl.where(enters, ei, hi)
            if CONSTANT:
                gr, gi = tl.where(there, cr, 1.0), tl.where(there, ci, 0.0)
            else:
                gr, gi = loaded[4 * u + 2], loaded[4 * u + 3]
            hr, hi = fma_of(gr, gi, hr, hi, loaded[4 * u], loaded[4 * u + 1], COMPLEX)
            at = states.pointer + track.to(tl.int64) * states.track + row * states.time
            if PACKED:
                outr, outi = tl.where(inside, hr, 0.0), tl.where(inside, hi, 0.0)
                _store(at, columns, wide & there, outr, outi, COMPLEX)
                keep(final, owner, width, columns, wide & leaves, hr, hi, COMPLEX)
            else:
                _store(at, columns, wide & there, hr, hi, COMPLEX)
    if not PACKED:
        last = wide & (end == time)
        keep(final, track, width, columns, last, hr, hi, COMPLEX)


@triton.jit
def backward_kernel(
    grad,
    gates,
    states,
    d_tokens,
    d_gates,
    sums,
    entering,
    d_final,
    initial,
    d_initial,
    packing,
    time,
    width,
    chunk,
    chunks,
    column_tiles,
    GRAD: tl.constexpr,
    WANTS_GATES: tl.constexpr,
    COMPLEX: tl.constexpr,
    CONSTANT: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """a = dh + c, dx = a, dg = conj(h before) a, c = conj(g) a. The state before a step is that of
    the row visited next. `sums`: of dg over a chunk, in float64, where gates are CONSTANT."""
    track, number, begin, end, columns, wide = _place(
        time, width, chunk, chunks, column_tiles, BLOCK
    )
    if entering is not None:
        cr, ci = state_of(entering, track * chunks + number, width, columns, wide, COMPLEX)
    else:
        cr, ci = state_of(None if PACKED else d_final, track, width, columns, wide, COMPLEX)
    if CONSTANT:
        kr, ki = _load(gates.pointer, columns, wide, 0.0, COMPLEX)
    sum_r = tl.zeros((BLOCK,), tl.float64)
    sum_i = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, STEPS):
        loaded = ()
        for u in tl.static_range(STEPS):
            row = _row(start + u, time, REVERSED)
            inside, _, leaves, owner = _kind(packing, row, start + u < end, PACKED, REVERSED)
            if not PACKED:
                leaves = start + u == time - 1
                owner = track
            mask = wide & inside
            loaded += _operands(grad, track, row, columns, mask, 0.0, GRAD, COMPLEX)
            loaded += _operands(gates, track, row, columns, mask, 1.0, not CONSTANT, COMPLEX)
            before = _row(start + u + 1, time, REVERSED)
            known = mask & ~leaves
            br, bi = _operands(states, track, before, columns, known, 0.0, WANTS_GATES, COMPLEX)
            if WANTS_GATES:
                er, ei = state_of(initial, owner, width, columns, mask & leaves, COMPLEX)
                br, bi = tl.where(leaves, er, br), tl.where(leaves, ei, bi)
            loaded += (br, bi)
        for u in tl.static_range(STEPS):
            there = start + u < end
            row = _row(start + u, time, REVERSED)
            inside, enters, leaves, owner = _kind(packing, row, there, PACKED, REVERSED)
            if PACKED:
                er, ei = state_of(d_final, owner, width, columns, wide & enters, COMPLEX)
                cr, ci = tl.where(enters, er, cr), tl.where(enters, ei, ci)
            ar, ai = cr + loaded[6 * u], ci + loaded[6 * u + 1]
            if CONSTANT:
                gr, gi = tl.where(there, kr, 1.0), tl.where(there, ki, 0.0)
            else:
                gr, gi = loaded[6 * u + 2], loaded[6 * u + 3]
            if d_tokens.pointer is not None:
                at = d_tokens.pointer + track.to(tl.int64) * d_tokens.track + row * d_tokens.time
                dr, di = tl.where(inside, ar, 0.0), tl.where(inside, ai, 0.0)
                _store(at, columns, wide & there, dr, di, COMPLEX)
            if WANTS_GATES:
                hr, hi = loaded[6 * u + 4], loaded[6 * u + 5]
                dr, di = _conj_mul(hr, hi, ar, ai, COMPLEX)
                dr, di = tl.where(inside, dr, 0.0), tl.where(inside, di, 0.0)
                if CONSTANT:
                    sum_r += dr.to(tl.float64)
                    sum_i += di.to(tl.float64)
                else:
                    at = d_gates.pointer + track.to(tl.int64) * d_gates.track + row * d_gates.time
                    _store(at, columns, wide & there, dr, di, COMPLEX)
            cr, ci = _conj_mul(gr, gi, ar, ai, COMPLEX)
            if PACKED and d_initial is not None:
                keep(d_initial, owner, width, columns, wide & leaves, cr, ci, COMPLEX)
    if d_initial is not None and not PACKED:
        last = wide & (end == time)
        keep(d_initial, track, width, columns, last, cr, ci, COMPLEX)
    if sums is not None:
        index = (track * chunks + number).to(tl.int64)
        at = sums + index * width * (2 if COMPLEX else 1)
        if COMPLEX:
            tl.store(at + 2 * columns, sum_r, mask=wide)
            tl.store(at + 2 * columns + 1, sum_i, mask=wide)
        else:
            tl.store(at + columns, sum_r, mask=wide)


@triton.jit
def summary_kernel(
    gates,
    tokens,
    entered,
    products,
    ends,
    resets,
    packing,
    time,
    width,
    chunk,
    chunks,
    column_tiles,
    TOKENS: tl.constexpr,
    BACKWARD: tl.constexpr,
    COMPLEX: tl.constexpr,
    CONSTANT: tl.constexpr,
    PACKED: tl.constexpr,
    REVERSED: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a chunk does to any state that enters it: state -> product * state + end. BACKWARD: of
    the recurrence c = conj(g) (x + c). `resets`: whether a sequence begins in the chunk, so that
    what enters is lost."""
    track, number, begin, end, columns, wide = _place(
        time, width, chunk, chunks, column_tiles, BLOCK
    )
    hr, hi = state_of(None, track, width, columns, wide, COMPLEX)
    pr, pi = hr + 1.0, hi
    reset = 0
    if CONSTANT:
        cr, ci = _load(gates.pointer, columns, wide, 0.0, COMPLEX)
    for start in range(begin, end, STEPS):
        loaded = ()
        for u in tl.static_range(STEPS):
            row = _row(start + u, time, REVERSED)
            inside, _, _, _ = _kind(packing, row, start + u < end, PACKED, REVERSED)
            mask = wide & inside
            loaded += _operands(tokens, track, row, columns, mask, 0.0, TOKENS, COMPLEX)
            loaded += _operands(gates, track, row, columns, mask, 1.0, not CONSTANT, COMPLEX)
        for u in tl.static_range(STEPS):
            there = start + u < end
            row = _row(start + u, time, REVERSED)
            _, enters, _, owner = _kind(packing, row, there, PACKED, REVERSED)
            if PACKED:
                er, ei = state_of(entered, owner, width, columns, wide & enters, COMPLEX)
                hr, hi = tl.where(enters, er, hr), tl.where(enters, ei, hi)
                reset = tl.where(enters, 1, reset)
            xr, xi = loaded[4 * u], loaded[4 * u + 1]
            if CONSTANT:
                gr, gi = tl.where(there, cr, 1.0), tl.where(there, ci, 0.0)
            else:
                gr, gi = loaded[4 * u + 2], loaded[4 * u + 3]
            if BACKWARD:
                hr, hi = _conj_mul(gr, gi, hr + xr, hi + xi, COMPLEX)
                pr, pi = _conj_mul(gr, gi, pr, pi, COMPLEX)
            else:
                hr, hi = fma_of(gr, gi, hr, hi, xr, xi, COMPLEX)
                pr, pi = fma_of(gr, gi, pr, pi, tl.zeros_like(pr), tl.zeros_like(pr), COMPLEX)
    index = track * chunks + number
    keep(products, index, width, columns, wide, pr, pi, COMPLEX)
    keep(ends, index, width, columns, wide, hr, hi, COMPLEX)
    if PACKED:
        tl.store(resets + index, reset)

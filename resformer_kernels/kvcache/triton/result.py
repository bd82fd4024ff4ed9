"""Results of attention, and the merge of splits (split-KV) into them.

No program waits for another: the last one of a tile of rows to finish merges all of its splits, in
their order, so that the bits do not depend on which one that is. The protocol between programs:

- A counter per tile of rows is 0 before the launch: a launch before it on the stream writes that.
- A program stores its partials; a barrier; one thread adds 1 to the counter, as release and acquire
  at the scope of the GPU. A release covers what its thread has observed, so, past the barrier, the
  stores of all threads.
- The program that finds `splits - 1` before its own has acquired what all the others released. Past
  a second barrier its threads load the partials, from the second-level cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.views import View
from resformer_kernels.attention.triton.loads import Source, row_cells, store_rows
from resformer_kernels.attention.triton.problem import Numbers
from resformer_kernels.attention.triton.softmax import close_rows, exponential
from resformer_kernels.kvcache.triton.epilogue import finished

_ROWS: tl.constexpr = tl.constexpr(8)
"""Rows that are merged together: their sums of one split are few enough for registers."""
_PEAKS: tl.constexpr = tl.constexpr(64)
_AT_ONCE: tl.constexpr = tl.constexpr(4)
"""Splits whose peaks, and whose sums, are loaded together."""


class Result(NamedTuple):
    """Results of a row: out, and the LSE if its view has a pointer."""

    out: View
    lse: Numbers
    sinks: Tensor | None
    WIDTH: Any
    """Channels of out."""
    BLOCK: Any
    """WIDTH, padded."""
    PRECISE: Any
    """Exponentials to an ulp, in natural units."""
    FINISHES: Any
    """Whether there is an epilogue. Triton does not compare a record that holds None with None."""


class Partials(NamedTuple):
    """Softmax of every split, (sequences, KV heads, rows, splits), written by those that have keys;
    without tensors: no splits."""

    sums: Tensor | None
    """Shape: (..., WIDTH)."""
    peaks: Tensor | None
    totals: Tensor | None
    counters: Tensor | None
    """Finished splits of a tile of rows, (sequences, KV heads, tiles of rows)."""


@triton.jit
def store_result(result, epilogue, cache, geometry, at, rows, softmax):
    """Close the softmax of rows and store their out and LSE; softmax: (peak, total, acc)."""
    peak, total, acc = softmax
    heads = at.head * geometry.GROUP + rows % geometry.GROUP
    factor, logarithm = close_rows(peak, total, result.sinks, heads, result.PRECISE)
    tile = acc * factor[:, None]
    if result.FINISHES:
        tile = finished(tile, epilogue, cache, geometry, at, rows)
    store_rows(tile, Source(result.out, None, geometry, result.WIDTH, result.BLOCK), at, rows)
    if result.lse.pointer is not None:
        tl.store(row_cells(result.lse, at, rows, geometry.GROUP), logarithm, mask=rows < at.count)


@triton.jit
def store_split(partials, slots, inside, softmax, WIDTH: tl.constexpr):
    """Store one split of a tile of rows; softmax: (peak, total, acc)."""
    peak, total, acc = softmax
    columns = tl.arange(0, acc.shape[1])
    tl.store(partials.peaks + slots, peak, mask=inside)
    tl.store(partials.totals + slots, total, mask=inside)
    cells = partials.sums + slots[:, None] * WIDTH + columns[None, :]
    tl.store(cells, acc, mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def finish_split(counter, splits):
    """Whether all splits are stored, after this program has stored its own: see above."""
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return before == splits - 1


@triton.jit
def merge(
    partials, result, epilogue, cache, geometry, at, first_row, end_row, first_slot, splits, used
):
    """Results of rows from those of their splits that have keys, the first `used` ones;
    `first_slot` is the first of row 0.

    Each split counts by exp(its peak - the highest peak).
    """
    for start in tl.range(first_row, end_row, _ROWS):
        rows = start + tl.arange(0, _ROWS)
        inside = rows < end_row
        slots = first_slot + rows.to(tl.int64) * splits
        peaks = tl.full([_ROWS, _PEAKS], float("-inf"), tl.float32)
        for some in tl.range(0, used, _PEAKS):
            split = some + tl.arange(0, _PEAKS)
            found = tl.load(
                partials.peaks + slots[:, None] + split[None, :],
                mask=inside[:, None] & (split < used)[None, :],
                other=float("-inf"),
                cache_modifier=".cg",
            )
            peaks = tl.maximum(peaks, found)
        peak = tl.max(peaks, 1)
        base = tl.where(peak == float("-inf"), 0.0, peak)
        columns = tl.arange(0, result.BLOCK)
        acc = tl.zeros([_ROWS, result.BLOCK], tl.float32)
        total = tl.zeros([_ROWS], tl.float32)
        for some in tl.range(0, used, _AT_ONCE):
            # Independent loads, which are under way together.
            for i in tl.static_range(_AT_ONCE):
                known = inside & (some + i < used)
                own = tl.load(
                    partials.peaks + slots + (some + i),
                    mask=known,
                    other=float("-inf"),
                    cache_modifier=".cg",
                )
                part = tl.load(
                    partials.totals + slots + (some + i),
                    mask=known,
                    other=0.0,
                    cache_modifier=".cg",
                )
                cells = (slots + (some + i))[:, None] * result.WIDTH + columns[None, :]
                # (_ROWS, BLOCK)
                sums = tl.load(
                    partials.sums + cells,
                    mask=known[:, None] & (columns < result.WIDTH)[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
                # A row that sees nothing of a split has a total of 0 there, not that of a NaN, and
                # may have sums that are no numbers: 0 times an infinite value.
                sums = tl.where((part != 0.0)[:, None], sums, 0.0)
                weight = exponential(own - base, result.PRECISE)
                acc += weight[:, None] * sums
                total += weight * part
        store_result(result, epilogue, cache, geometry, at, rows, (peak, total, acc))

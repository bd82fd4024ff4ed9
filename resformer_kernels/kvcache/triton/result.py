"""Results of attention, and the merge of splits (split-KV) into them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.launch import launch
from resformer_kernels._triton.views import View
from resformer_kernels.attention.triton.loads import Source, row_cells, store_rows
from resformer_kernels.attention.triton.problem import Geometry, Numbers
from resformer_kernels.attention.triton.softmax import close_rows, exponential
from resformer_kernels.attention.triton.tiles import Limits, place
from resformer_kernels.kvcache.triton.problem import Problem


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


class Partials(NamedTuple):
    """Softmax of every split, (sequences, KV heads, rows, splits); without tensors: no splits."""

    sums: Tensor | None
    """Shape: (..., WIDTH). Not written by a split without keys."""
    peaks: Tensor | None
    totals: Tensor | None
    """0 where a split has no keys."""


@triton.jit
def store_result(result, geometry, at, rows, softmax):
    """Close the softmax of rows and store their out and LSE; softmax: (peak, total, acc)."""
    peak, total, acc = softmax
    heads = at.head * geometry.GROUP + rows % geometry.GROUP
    factor, logarithm = close_rows(peak, total, result.sinks, heads, result.PRECISE)
    tile = acc * factor[:, None]
    store_rows(tile, Source(result.out, None, geometry, result.WIDTH, result.BLOCK), at, rows)
    if result.lse.pointer is not None:
        tl.store(row_cells(result.lse, at, rows, geometry.GROUP), logarithm, mask=rows < at.count)


@triton.jit
def merge_kernel(
    partials, result, geometry, q_len, splits, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr
):
    """One row from its splits, by their LSEs: each counts by exp(its peak - the highest peak)."""
    program = tl.program_id(0)
    count = q_len * geometry.GROUP
    row = program % count
    sequence_head = program // count
    sequence = sequence_head // geometry.heads
    at = place(geometry, Limits(q_len, 0, 0, 0), sequence, sequence_head % geometry.heads)
    first = tl.cast(program, tl.int64) * splits
    every = tl.arange(0, SPLITS)
    found = tl.load(partials.peaks + first + every, mask=every < splits, other=float("-inf"))
    peak = tl.max(found[None, :], 1)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    columns = tl.arange(0, result.BLOCK)
    acc = tl.zeros([1, result.BLOCK], tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in tl.range(0, splits, AT_ONCE):
        some = start + tl.arange(0, AT_ONCE)
        inside = some < splits
        weight = tl.load(partials.peaks + first + some, mask=inside, other=float("-inf"))
        weight = exponential(weight - base, result.PRECISE)
        part = tl.load(partials.totals + first + some, mask=inside, other=0.0)
        cells = partials.sums + (first + some)[:, None] * result.WIDTH + columns[None, :]
        # A split without keys has no sums. Its total is 0; that of a NaN is not.
        mask = (inside & (part != 0.0))[:, None] & (columns < result.WIDTH)[None, :]
        # (AT_ONCE, BLOCK)
        sums = tl.load(cells, mask=mask, other=0.0)
        acc += tl.sum(weight[:, None] * sums, 0)[None, :]
        total += tl.sum((weight * part)[None, :], 1)
    store_result(result, geometry, at, row + tl.arange(0, 1), (peak, total, acc))


def merge(p: Problem, partials: Partials, result: Result, splits: int, geometry: Geometry) -> None:
    """Results of all rows from their splits."""
    every = 1 << (splits - 1).bit_length()
    launch(
        merge_kernel,
        (p.sequences * p.heads * p.rows,),
        p.call.q.device,
        partials=partials,
        result=result,
        geometry=geometry,
        q_len=p.queries,
        splits=splits,
        SPLITS=every,
        AT_ONCE=min(16, every),
        num_warps=4,
    )

"""Results of attention, and the merge of splits (split-KV) into them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton import device as lib
from resformer_kernels._triton.device import round_to
from resformer_kernels._triton.views import View
from resformer_kernels.attention.triton.loads import at_head, row_pointers
from resformer_kernels.attention.triton.tiles import close_rows, probabilities
from resformer_kernels.kvcache.triton.problem import Problem


class Result(NamedTuple):
    """Results of a row: out, and the LSE if its view has a pointer."""

    out: View
    lse: View
    sinks: Tensor | None
    GROUP: Any
    """Query heads per KV head."""
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


class Rows(NamedTuple):
    """Rows of a KV head of a sequence; nothing is stored where not `inside`."""

    sequence: Any
    head: Any
    rows: Any
    inside: Any


@triton.jit
def store_rows(result, at, softmax, alpha):
    """Close the softmax of rows and store their out and LSE.

    softmax: (peak, total, acc), the last two unnormalised; alpha as `close_rows` takes it.
    """
    peak, total, acc = softmax
    rows = at.rows
    first_head = at.head * result.GROUP
    factor, logarithm = close_rows(
        peak, total, result.sinks, first_head + rows % result.GROUP, alpha,
        result.PRECISE, result.lse.pointer is not None,
    )  # fmt: skip
    out, lse = result.out, result.lse
    columns = tl.arange(0, result.BLOCK)
    # (ROWS, BLOCK)
    rounded = round_to(acc * factor[:, None], out.pointer.dtype.element_ty)
    base = at_head(out, at.sequence, 0, first_head)
    mask = at.inside[:, None] & (columns < result.WIDTH)[None, :]
    tl.store(row_pointers(out, base, rows, columns, result.GROUP), rounded, mask=mask)
    if lse.pointer is not None:
        queries = (rows // result.GROUP).to(tl.int64) * lse.time
        places = queries + (rows % result.GROUP).to(tl.int64) * lse.head
        tl.store(at_head(lse, at.sequence, 0, first_head) + places, logarithm, mask=at.inside)


@triton.jit(do_not_specialize=["count", "splits"])
def merge_kernel(
    partials, result, count, heads, splits, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr
):
    """One row from its splits, by their LSEs: each counts by exp(its peak - the highest peak)."""
    program = tl.program_id(0)
    row = program % count
    sequence_head = program // count
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
        weight = probabilities(weight, base, 1.0, False, result.PRECISE)
        part = tl.load(partials.totals + first + some, mask=inside, other=0.0)
        at = partials.sums + (first + some)[:, None] * result.WIDTH + columns[None, :]
        # A split without keys has no sums. Its total is 0; that of a NaN is not.
        mask = (inside & (part != 0.0))[:, None] & (columns < result.WIDTH)[None, :]
        # (AT_ONCE, BLOCK)
        sums = tl.load(at, mask=mask, other=0.0)
        acc += tl.sum(weight[:, None] * sums, 0)[None, :]
        total += tl.sum((weight * part)[None, :], 1)
    rows = row + tl.arange(0, 1)
    place = Rows(sequence_head // heads, sequence_head % heads, rows, rows >= 0)
    store_rows(result, place, (peak, total, acc), 1.0)


def merge(p: Problem, partials: Partials, result: Result, splits: int) -> None:
    """Results of all rows from their splits."""
    every = 1 << (splits - 1).bit_length()
    lib.launch(
        merge_kernel,
        (p.sequences * p.heads * p.rows,),
        p.call.q.device,
        partials=partials,
        result=result,
        count=p.rows,
        heads=p.heads,
        splits=splits,
        SPLITS=every,
        AT_ONCE=min(16, every),
        num_warps=4,
    )

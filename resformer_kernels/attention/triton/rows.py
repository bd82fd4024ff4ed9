"""Backward's first pass on a GPU: the numbers of each row, and the sinks' gradient.

dO and O are reduced to delta; the LSE becomes base + rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._core.strides import unit_stride
from resformer_kernels._triton.device import dot, exp, widen
from resformer_kernels._triton.launch import empty, launch
from resformer_kernels._triton.views import view_of
from resformer_kernels.attention.op import BackwardCall
from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.attention.triton.loads import (
    ROW_SLOT,
    Source,
    load_keys,
    load_row_tile,
    row_cells,
    row_slot,
)
from resformer_kernels.attention.triton.problem import config_of, lse_view, padded, shared
from resformer_kernels.attention.triton.softmax import LOG2E, scores, softmax_step
from resformer_kernels.attention.triton.tiles import (
    Limits,
    place,
    scheduled,
    seen_by_rows,
    spans_of_rows,
    work_of,
)


class Incoming(NamedTuple):
    """The gradients of the outputs, V' mixed again, and what is known of each row."""

    grad_out: Tensor
    grad_mixed: Tensor | None
    mixed: Tensor
    base: Tensor
    """The LSE in the unit of scores, 0 for rows without keys."""
    delta: Tensor
    """dO.O - dLSE."""
    rest: Tensor | None
    """Under an additive bias, what the LSE has beyond `base`: see `split_lse_kernel`."""
    slots: int
    """Numbers of a KV head: see `loads.row_slot`."""

    def row_numbers(self) -> dict[str, Any]:
        """The arguments of the kernels that read them."""
        return {"base": self.base, "delta": self.delta, "rest": self.rest, "slots": self.slots}


@triton.jit
def rows_kernel(
    grad_out,
    out,
    dots,
    lse,
    grad_lse,
    sinks,
    sink_rows,
    base,
    delta,
    rest,
    slots,
    tiles,
    scoring,
    geometry,
    q_len,
    k_len,
    window_left,
    window_right,
    sizes,
):
    """delta = dO.O - dLSE of ROWS rows, the LSE in the unit of scores, and the sinks' summands.

    `dots` is dO.O, where an epilogue's gradient has it already.
    """
    ROWS: tl.constexpr = sizes.ROWS
    GROUP: tl.constexpr = geometry.GROUP
    tile = tl.program_id(0) % tiles
    index = tl.program_id(0) // tiles
    limits = Limits(q_len, k_len, window_left, window_right)
    at = place(geometry, limits, index // geometry.heads, index % geometry.heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    there = rows < at.count
    if dots.pointer is None:
        # (ROWS, BLOCK_V)
        gradient = load_row_tile(
            Source(grad_out, None, geometry, sizes.DIM_V, sizes.BLOCK_V),
            at,
            tile * ROWS,
            ROWS,
            True,
        )
        result = load_row_tile(
            Source(out, None, geometry, sizes.DIM_V, sizes.BLOCK_V), at, tile * ROWS, ROWS, True
        )
        d = tl.sum(widen(gradient) * widen(result), 1)
    else:
        d = tl.load(row_cells(dots, at, rows, GROUP), mask=there, other=0.0)
    if grad_lse.pointer is not None:
        d -= widen(tl.load(row_cells(grad_lse, at, rows, GROUP), mask=there, other=0.0))
    logarithm = tl.load(row_cells(lse, at, rows, GROUP), mask=there, other=0.0)
    scaled = logarithm
    if not scoring.NATURAL:
        scaled = logarithm * LOG2E
    # Zeros past the last row, as far as others' tiles reach.
    reached = rows < tl.cdiv(at.count, ROW_SLOT) * ROW_SLOT
    slot = row_slot(at, slots, geometry)
    tl.store(delta + slot + rows, d, mask=reached)
    tl.store(base + slot + rows, tl.where(scaled == float("-inf"), 0.0, scaled), mask=reached)
    if rest is not None:
        tl.store(rest + slot + rows, tl.zeros([ROWS], tl.float32), mask=reached)
    if sink_rows.pointer is not None:
        # The sink is a score whose value is zero: dP = 0, so dS = -P delta.
        sink = widen(tl.load(sinks + at.head * GROUP + rows % GROUP))
        term = tl.where(logarithm == float("-inf"), 0.0, -exp(sink - logarithm) * d)
        tl.store(row_cells(sink_rows, at, rows, GROUP), term, mask=there)


@triton.jit
def split_lse_kernel(
    q,
    k,
    sinks,
    sink_rows,
    base,
    delta,
    rest,
    slots,
    work,
    scoring,
    geometry,
    q_len,
    k_len,
    window_left,
    window_right,
    sizes,
):
    """LSE = base + rest, the softmax's maximum and the log of its sum, for rows of a large LSE.

    A row that a bias masks whole with a large finite number has an LSE in which float32 has no room
    for the log of the sum. Tiles without such a row return at once.
    """
    ROWS: tl.constexpr = sizes.ROWS
    KEYS: tl.constexpr = sizes.KEYS
    # From here on an LSE's rounding is more than that of the inputs' dtype in every probability.
    COARSE: tl.constexpr = 1024.0 if scoring.PRECISE else 8192.0
    limits = Limits(q_len, k_len, window_left, window_right)
    tile, at = scheduled(work, geometry, limits, False)
    if tile * ROWS >= at.count:
        return
    rows, spans = spans_of_rows(tile, at, geometry, sizes)
    cells = row_slot(at, slots, geometry) + rows
    there = rows < at.count
    size = tl.abs(tl.load(base + cells, mask=there, other=0.0))
    coarse = (size > COARSE) & (size < float("inf"))
    if tl.max(coarse.to(tl.int32), 0) == 0:
        return
    # (ROWS, BLOCK_K)
    q_tile = load_row_tile(
        Source(q, None, geometry, sizes.DIM_K, sizes.BLOCK_K), at, tile * ROWS, ROWS, True
    )
    seen = seen_by_rows(rows, at, scoring, geometry)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for step in tl.range(spans.begin, spans.end):
        # (KEYS, BLOCK_K)
        k_tile = load_keys(
            Source(k, None, geometry, sizes.DIM_K, sizes.BLOCK_K), at, step * KEYS, KEYS, True
        )
        # (ROWS, KEYS)
        product = dot(q_tile, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32))
        keys = step * KEYS + tl.arange(0, KEYS)
        x, _slope = scores(product, keys[None, :], seen, scoring, True)
        _p, peak, total, _acc = softmax_step(x, peak, total, total[:, None], scoring)
    top = peak
    if sinks is not None:
        sink = widen(tl.load(sinks + at.head * geometry.GROUP + rows % geometry.GROUP))
        top = tl.maximum(peak, sink)
        total = total * exp(peak - top) + exp(sink - top)
    logarithm = tl.log(total)
    tl.store(base + cells, top, mask=there & coarse)
    tl.store(rest + cells, logarithm, mask=there & coarse)
    if sink_rows.pointer is not None:
        term = -exp(sink - top - logarithm) * tl.load(delta + cells, mask=there, other=0.0)
        cells = row_cells(sink_rows, at, rows, geometry.GROUP)
        tl.store(cells, term, mask=there & coarse)


def reduce_rows(
    given: BackwardCall, mixed: Tensor, dots: Tensor | None, *, want_sinks: bool
) -> tuple[Incoming, Tensor | None]:
    """(what the other kernels read, the sinks' gradient).

    `mixed` is V', `dots` dO.O of each row, where it is known.
    """
    call = given.call
    slots = _slots(given)
    base, delta, rest = (empty(call.q, (call.kv_heads * slots,), torch.float32) for _ in range(3))
    additive = call.attn_bias is not None and call.attn_bias.dtype is not torch.bool
    grad_lse = given.grad_lse if given.grad_lse is not None and given.grad_lse.numel() else None
    incoming = Incoming(
        unit_stride(given.grad_out),
        None if given.grad_mixed is None else unit_stride(given.grad_mixed),
        mixed,
        base,
        delta,
        rest if additive else None,
        slots,
    )
    size = max(16, 4096 // padded(call.value.shape[-1]))
    reached = -(-call.max_rows // ROW_SLOT.value) * ROW_SLOT.value
    tiles = -(-reached // size)
    sink_rows = call.q.new_zeros(given.lse.shape, dtype=torch.float32) if want_sinks else None
    launch(
        rows_kernel,
        (call.sequences * call.kv_heads * tiles,),
        call.q.device,
        grad_out=view_of(None if dots is not None else incoming.grad_out),
        out=view_of(None if dots is not None else given.out),
        dots=lse_view(dots),
        lse=lse_view(given.lse),
        grad_lse=lse_view(grad_lse),
        sinks=call.sinks,
        sink_rows=lse_view(sink_rows),
        tiles=tiles,
        num_warps=4,
        **incoming.row_numbers(),
        **shared(call, size, 0),
    )
    if additive:
        _split_lse(call, incoming, sink_rows)
    if sink_rows is None or call.sinks is None:
        return incoming, None
    over = (1,) if call.packed else (0, 2)
    return incoming, sink_rows.sum(over, dtype=torch.float64).to(call.sinks.dtype)


def _split_lse(call: AttentionCall, incoming: Incoming, sink_rows: Tensor | None) -> None:
    config = config_of(call, "queries")
    work = work_of(call, config, by_rows=True)
    launch(
        split_lse_kernel,
        (call.sequences * call.kv_heads * work.tiles,),
        call.q.device,
        q=view_of(call.q),
        k=view_of(call.k),
        sinks=call.sinks,
        sink_rows=lse_view(sink_rows),
        work=work,
        num_warps=config.warps,
        num_stages=config.stages,
        **incoming.row_numbers(),
        **shared(call, config.rows, config.keys),
    )


def _slots(given: BackwardCall) -> int:
    """Numbers of a KV head's rows, with room for each sequence to begin at its own slot."""
    call = given.call
    queries = call.q.shape[0] * (1 if call.packed else call.q.shape[1])
    size = ROW_SLOT.value
    return (-(-queries * call.group // size) + call.sequences + 1) * size

"""Backward's first pass on a GPU: dO and O reduced to one number a row, and the sinks' gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._core.strides import unit_stride
from resformer_kernels._triton.device import exp, widen
from resformer_kernels._triton.launch import empty, launch
from resformer_kernels._triton.views import view_of
from resformer_kernels.attention.op import BackwardCall
from resformer_kernels.attention.triton.forward import premix
from resformer_kernels.attention.triton.loads import (
    ROW_SLOT,
    Source,
    load_row_tile,
    row_cells,
    row_slot,
)
from resformer_kernels.attention.triton.problem import lse_view, padded, shared
from resformer_kernels.attention.triton.softmax import LOG2E
from resformer_kernels.attention.triton.tiles import Limits, place


class Incoming(NamedTuple):
    """The gradients of the outputs, V' mixed again, and what is known of each row."""

    grad_out: Tensor
    grad_mixed: Tensor | None
    mixed: Tensor
    base: Tensor
    """The LSE in the unit of scores, 0 for rows without keys."""
    delta: Tensor
    """dO.O - dLSE."""
    slots: int
    """Numbers of a KV head: see `loads.row_slot`."""

    def row_numbers(self) -> dict[str, Any]:
        """The arguments of the kernels that read them."""
        return {"base": self.base, "delta": self.delta, "slots": self.slots}


@triton.jit(do_not_specialize=["q_len", "k_len", "window_left", "window_right"])
def rows_kernel(
    grad_out,
    out,
    lse,
    grad_lse,
    sinks,
    sink_rows,
    base,
    delta,
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
    """delta = dO.O - dLSE of ROWS rows, the LSE in the unit of scores, and the sinks' summands."""
    ROWS: tl.constexpr = sizes.ROWS
    GROUP: tl.constexpr = geometry.GROUP
    tile = tl.program_id(0) % tiles
    index = tl.program_id(0) // tiles
    limits = Limits(q_len, k_len, window_left, window_right)
    at = place(geometry, limits, index // geometry.heads, index % geometry.heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    there = rows < at.count
    # (ROWS, BLOCK_V)
    gradient = load_row_tile(
        Source(grad_out, None, geometry, sizes.DIM_V, sizes.BLOCK_V), at, tile * ROWS, ROWS, True
    )
    result = load_row_tile(
        Source(out, None, geometry, sizes.DIM_V, sizes.BLOCK_V), at, tile * ROWS, ROWS, True
    )
    d = tl.sum(widen(gradient) * widen(result), 1)
    if grad_lse.pointer is not None:
        d -= widen(tl.load(row_cells(grad_lse, at, rows, GROUP), mask=there, other=0.0))
    logarithm = tl.load(row_cells(lse, at, rows, GROUP), mask=there, other=0.0)
    empty = logarithm == float("-inf")
    scaled = logarithm
    if not scoring.PRECISE:
        scaled = logarithm * LOG2E
    slot = row_slot(at, slots, geometry)
    tl.store(delta + slot + rows, d, mask=there)
    tl.store(base + slot + rows, tl.where(empty, 0.0, scaled), mask=there)
    if sink_rows.pointer is not None:
        # The sink is a score whose value is zero: dP = 0, so dS = -P delta.
        sink = widen(tl.load(sinks + at.head * GROUP + rows % GROUP))
        term = tl.where(empty, 0.0, -exp(sink - logarithm) * d)
        tl.store(row_cells(sink_rows, at, rows, GROUP), term, mask=there)


def reduce_rows(given: BackwardCall, *, want_sinks: bool) -> tuple[Incoming, Tensor | None]:
    """(what the other kernels read, the sinks' gradient)."""
    call = given.call
    slots = _slots(given)
    base, delta = (empty(call.q, (call.kv_heads * slots,), torch.float32) for _ in range(2))
    grad_lse = given.grad_lse if given.grad_lse is not None and given.grad_lse.numel() else None
    incoming = Incoming(
        unit_stride(given.grad_out),
        unit_stride(given.grad_mixed)
        if given.grad_mixed is not None and given.grad_mixed.numel()
        else None,
        premix(call) if call.mixes else call.value,
        base,
        delta,
        slots,
    )
    size = max(16, 4096 // padded(call.value.shape[-1]))
    tiles = -(-call.max_rows // size)
    sink_rows = call.q.new_zeros(given.lse.shape, dtype=torch.float32) if want_sinks else None
    launch(
        rows_kernel,
        (call.sequences * call.kv_heads * tiles,),
        call.q.device,
        grad_out=view_of(incoming.grad_out),
        out=view_of(given.out),
        lse=lse_view(given.lse),
        grad_lse=lse_view(grad_lse),
        sinks=call.sinks,
        sink_rows=lse_view(sink_rows),
        tiles=tiles,
        num_warps=4,
        **incoming.row_numbers(),
        **shared(call, size, 0),
    )
    if sink_rows is None or call.sinks is None:
        return incoming, None
    over = (1,) if call.packed else (0, 2)
    return incoming, sink_rows.sum(over, dtype=torch.float64).to(call.sinks.dtype)


def _slots(given: BackwardCall) -> int:
    """Numbers of a KV head's rows, with room for each sequence to begin at its own slot."""
    call = given.call
    queries = call.q.shape[0] * (1 if call.packed else call.q.shape[1])
    size = ROW_SLOT.value
    return (-(-queries * call.group // size) + call.sequences + 1) * size

"""The gradient of an embedding's table, and the launches of an embedding's backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton import device
from resformer_kernels._triton.launch import empty, launch
from resformer_kernels._triton.views import view_of
from resformer_kernels.mix import op
from resformer_kernels.mix.record import absent_like
from resformer_kernels.mix.triton import tiles
from resformer_kernels.mix.triton.backward import Wanted, run_backward


class Sorted(NamedTuple):
    """Ids in ascending order, and the position of each; equal ids keep their order."""

    ids: Tensor
    positions: Tensor


@triton.jit
def scatter_kernel(
    source,
    order,
    ends,
    targets,
    out,
    vocab,
    column_tiles,
    layout,
    SUM_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row targets[s] of out = sum of gate * grad, which are `source`, over the positions
    order.positions[s] .. order.positions[ends[s] - 1], which hold one id; written by the program of
    the first of them alone."""
    column_tile, start = tl.program_id(0) % column_tiles, tl.program_id(0) // column_tiles
    row = tl.load(order.ids + start)
    before = tl.load(order.ids + start - 1, mask=start > 0, other=-1)
    if (row >= 0) & (row < vocab) & ((start == 0) | (row != before)):
        columns = column_tile * BLOCK + tl.arange(0, BLOCK)
        column_mask = columns < layout.width
        end = tl.load(ends + start)
        total = tl.zeros((BLOCK,), SUM_TYPE)
        for first in range(start, end, ROWS):
            at = first + tl.arange(0, ROWS)
            position = tl.load(order.positions + at, mask=at < end, other=0)  # (ROWS,)
            tile = tiles.tile_at(layout, position, at < end, columns, column_mask)
            g = tiles.load(source.value, layout, tile)  # (ROWS, BLOCK)
            weight = tiles.coefficient_over(source, layout, tile)
            total += tl.sum(device.product(g.to(SUM_TYPE), weight), 0)
        rounded = device.round_to(total.to(tl.float32), out.dtype.element_ty)
        target = tl.load(targets + start)
        tl.store(out + target * layout.width + columns, rounded, mask=column_mask)


def mix_value_embedding_backward(back: op.DenseBackwardCall) -> tuple[Tensor, Tensor]:
    """The gradients of the table and the gate; those not in grad_mask have no elements."""
    grad, table, token_ids, gate, number = back.call
    d_table, d_gate = absent_like(table), absent_like(grad if gate is None else gate)
    if back.grad_mask & op.WANTS_GATE:
        assert gate is not None
        d_gate = empty(gate, gate.shape)
        rows = tiles.table_source(table, token_ids, gate, number)
        run_backward(grad, [Wanted(rows, None, d_gate)])
    if back.grad_mask & op.WANTS_TABLE:
        d_table = table.new_zeros(table.shape)
        order = _sorted(token_ids)
        _scatter(back.call, order, order.ids, d_table)
    return d_table, d_gate


def mix_value_embedding_backward_sparse(call: op.EmbeddingBackwardCall) -> tuple[Tensor, Tensor]:
    """(ids that occur, their rows of the table's gradient). Their number depends on data, for which
    the host waits."""
    order = _sorted(call.token_ids)
    ids, slots = torch.unique_consecutive(order.ids, return_inverse=True)
    rows = empty(call.table, (ids.shape[0], *call.table.shape[1:]))
    _scatter(call, order, slots, rows)
    return ids, rows


def _sorted(token_ids: Tensor) -> Sorted:
    return Sorted(*torch.sort(token_ids.flatten().long(), stable=True))


def _scatter(call: op.EmbeddingBackwardCall, order: Sorted, targets: Tensor, out: Tensor) -> None:
    grad, shape = call.grad, tiles.shape_of(call.grad)
    size = tiles.size_of(order.ids.shape[0], shape.width, widest=512, tallest=8)
    column_tiles = tiles.tiles_of(shape.width, size.columns)
    launch(
        scatter_kernel,
        (order.ids.shape[0] * column_tiles,),
        grad.device,
        source=tiles.source_of(view_of(grad), call.gate, call.gate_value),
        order=order,
        ends=torch.searchsorted(order.ids, order.ids, right=True),
        targets=targets,
        out=out,
        vocab=call.table.shape[0],
        column_tiles=column_tiles,
        layout=tiles.layout_of(shape, (view_of(grad),)),
        SUM_TYPE=tiles.sum_type(grad.dtype),
        ROWS=size.rows,
        BLOCK=size.columns,
        num_warps=4,
    )

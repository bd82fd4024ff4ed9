"""The forward kernel of both mixing ops, and its launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton import device
from resformer_kernels._triton.launch import empty, launch
from resformer_kernels._triton.views import view_of
from resformer_kernels.mix.record import EmbeddingCall, MixCall
from resformer_kernels.mix.triton import tiles

_MOST_SOURCES = 32
"""Sources of one launch; further ones are added to its float32 sum."""


@triton.jit
def forward_kernel(
    sources,
    so_far,
    out,
    count,
    row_count,
    column_tiles,
    layout,
    SOURCES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = [so_far +] sum of c_i V_i over the first `count` sources, in order."""
    program = tl.program_id(0)
    rows = (program // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = program % column_tiles * BLOCK + tl.arange(0, BLOCK)
    row_mask, column_mask = rows < row_count, columns < layout.width
    tile = tiles.tile_at(layout, rows, row_mask, columns, column_mask)
    at, mask = tiles.offsets_of(tile, layout), tiles.mask_of(tile)  # (ROWS, BLOCK)
    if so_far is not None:
        total = tl.load(so_far + at, mask=mask, other=0.0)
    for i in tl.static_range(SOURCES):
        there = row_mask & (i < count)
        present = tiles.Tile(rows, tile.batch, tile.time, columns, there, column_mask)
        x = tiles.load_source(sources[i], layout, present)
        c = tiles.coefficient_over(sources[i], layout, present)
        if i == 0 and so_far is None:
            total = c * x
        else:
            total = tl.where(i < count, tl.fma(c, x, total), total)
    tl.store(out + at, device.round_to(total, out.dtype.element_ty), mask=mask)


def mix_values_forward(call: MixCall) -> Tensor:
    """The mixed values."""
    return _forward(
        call.like, [tiles.source_of(view_of(v), c, number) for v, c, number in call.terms]
    )


def mix_value_embedding_forward(call: EmbeddingCall) -> Tensor:
    """v + gate * table[token_ids]."""
    rows = tiles.table_source(call.table, call.token_ids, call.gate, call.gate_value)
    return _forward(call.v, [tiles.source_of(view_of(call.v), None, 1.0), rows])


def _forward(like: Tensor, sources: list[tiles.Source]) -> Tensor:
    so_far: Tensor | None = None
    for first in range(0, len(sources), _MOST_SOURCES):
        last = first + _MOST_SOURCES >= len(sources)
        out = empty(like, like.shape, like.dtype if last else torch.float32)
        _launch(sources[first : first + _MOST_SOURCES], so_far, out)
        so_far = out
    return out


def _launch(sources: list[tiles.Source], so_far: Tensor | None, out: Tensor) -> None:
    shape, count = tiles.shape_of(out), len(sources)
    size = tiles.size_of(shape.rows, shape.width)
    # Powers of two bound the number of compilations; absent sources are masked and never read.
    room = 1 << (count - 1).bit_length()
    absent = tiles.source_of(sources[0].value, None, 0.0)
    column_tiles = tiles.tiles_of(shape.width, size.columns)
    launch(
        forward_kernel,
        (tiles.tiles_of(shape.rows, size.rows) * column_tiles,),
        out.device,
        sources=(*sources, *[absent] * (room - count)),
        so_far=so_far,
        out=out,
        count=count,
        row_count=shape.rows,
        column_tiles=column_tiles,
        layout=tiles.layout_of(shape, (source.value for source in sources)),
        SOURCES=room,
        ROWS=size.rows,
        BLOCK=size.columns,
        num_warps=4,
    )

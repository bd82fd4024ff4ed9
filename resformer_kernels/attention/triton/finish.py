"""What follows the softmax, on a tile of rows: exclusive self-attention and the output gate."""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels._triton.device import NUMBER, widen
from resformer_kernels.attention.triton.loads import (
    Source,
    load_own_values,
    load_row_factor,
    row_cells,
    store_rows,
)


@triton.jit
def finish_rows(y, mixed, epilogue, at, rows):
    """out of y (ROWS, BLOCK_V), in float32; what backward reads is stored where asked for."""
    GROUP: tl.constexpr = mixed.v.geometry.GROUP
    WIDTH: tl.constexpr = mixed.v.WIDTH
    columns = tl.arange(0, mixed.v.BLOCK)
    if epilogue.EXCLUDES:
        own = widen(load_own_values(mixed, at, rows))
        size = tl.maximum(tl.sum(own * own, 1), epilogue.least)
        along = tl.math.div_rn(tl.sum(y * own, 1), size)
        if epilogue.along.pointer is not None:
            tl.store(row_cells(epilogue.along, at, rows, GROUP), along, mask=rows < at.count)
        part = load_row_factor(epilogue.exclusive, at, rows, columns, GROUP, WIDTH)
        y -= part * along[:, None] * own
    if epilogue.ungated.pointer is not None:
        store_rows(
            y,
            Source(epilogue.ungated, None, mixed.v.geometry, WIDTH, mixed.v.BLOCK),
            at,
            rows,
        )
    if epilogue.gate.FORM != NUMBER:
        y *= load_row_factor(epilogue.gate, at, rows, columns, GROUP, WIDTH)
    return y

"""The Triton kernels of the mixing ops.

V is seen as rows, one for each (batch, time), of heads * DIM columns; column c is element c % DIM
of head c // DIM. A program has a tile of ROWS rows and BLOCK columns of a window: all columns, or
those of one head. JOINED says that each head follows the one before it in memory, in every operand
of V's shape: columns are then read without asking which head they are of. Pointers and strides
come as the tuples of `triton_launch.py`; `ids`, where TABLE is set, picks the rows of the last
source.

An id outside the table gives rows of NaN and no gradient: nothing is read or written there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from resformer_kernels._triton import device as lib


@triton.jit
def _load(
    view,
    batch,
    time,
    columns,
    row_mask,
    column_mask,
    DIM: tl.constexpr,
    JOINED: tl.constexpr,
):
    """A tile in float32, 0 outside the masks; `batch` and `time` are those of its rows."""
    along_rows = batch * view.batch + time * view.time
    if JOINED:
        along_columns = columns.to(tl.int64)
    else:
        along_columns = (columns // DIM).to(tl.int64) * view.head + columns % DIM
    at = view.pointer + along_rows[:, None] + along_columns[None, :]
    return lib.widen(tl.load(at, mask=row_mask[:, None] & column_mask[None, :], other=0.0))


@triton.jit
def _load_picked(
    table,
    ids,
    batch,
    time,
    columns,
    row_mask,
    column_mask,
    vocab,
    DIM: tl.constexpr,
    JOINED: tl.constexpr,
):
    """A tile of rows of a table, whose view has them along time."""
    at = ids.pointer + batch * ids.batch + time * ids.time
    picked = tl.load(at, mask=row_mask, other=0).to(tl.int64)
    exists = (picked >= 0) & (picked < vocab)
    found = _load(table, batch, picked, columns, row_mask & exists, column_mask, DIM, JOINED)
    return tl.where(exists[:, None], found, float("nan"))


@triton.jit
def _coefficient(
    c, batch, time, columns, row_mask, column_mask, DIM: tl.constexpr, FORM: tl.constexpr
):
    along_rows = batch * c.batch + time * c.time
    along_columns = (columns // DIM).to(tl.int64) * c.head + (columns % DIM) * c.column
    return lib.coefficient(
        c.pointer, c.number, along_rows, along_columns, 1, 1, row_mask, column_mask, FORM
    )


@triton.jit
def forward_kernel(
    values,
    coefficients,
    ids,
    so_far,
    out,
    count,
    vocab,
    row_count,
    time,
    width,
    column_tiles,
    SOURCES: tl.constexpr,
    FORMS: tl.constexpr,
    TABLE: tl.constexpr,
    TYPE: tl.constexpr,
    DIM: tl.constexpr,
    JOINED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = [so_far +] sum of c_i V_i over the first `count` sources, in order; TYPE is of out."""
    program = tl.program_id(0)
    rows = (program // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = program % column_tiles * BLOCK + tl.arange(0, BLOCK)
    batch, at_time = rows // time, rows % time
    row_mask, column_mask = rows < row_count, columns < width
    mask = row_mask[:, None] & column_mask[None, :]
    at = (rows * width)[:, None] + columns[None, :]
    if so_far is not None:
        total = tl.load(so_far + at, mask=mask, other=0.0)
    for i in tl.static_range(SOURCES):
        there = row_mask & (i < count)
        if TABLE and i == SOURCES - 1:
            x = _load_picked(
                values[i], ids, batch, at_time, columns, there, column_mask, vocab, DIM, JOINED
            )
        else:
            x = _load(values[i], batch, at_time, columns, there, column_mask, DIM, JOINED)
        c = _coefficient(
            coefficients[i], batch, at_time, columns, there, column_mask, DIM, FORMS[i]
        )
        if i == 0 and so_far is None:
            total = c * x
        else:
            total = tl.where(i < count, tl.fma(c, x, total), total)
    tl.store(out + at, lib.round_to(total, TYPE), mask=mask)


@triton.jit
def _visit(
    grad,
    value,
    coefficient,
    d_value,
    ids,
    vocab,
    time,
    width,
    rows,
    columns,
    row_mask,
    column_mask,
    FORM: tl.constexpr,
    WRITES: tl.constexpr,
    SUMMED: tl.constexpr,
    TABLE: tl.constexpr,
    TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    DIM: tl.constexpr,
    JOINED: tl.constexpr,
):
    """Writes a tile of dV where it is wanted; returns that of grad * V, 0 outside the masks."""
    batch, at_time = rows // time, rows % time
    g = _load(grad, batch, at_time, columns, row_mask, column_mask, DIM, JOINED)
    if WRITES:
        c = _coefficient(coefficient, batch, at_time, columns, row_mask, column_mask, DIM, FORM)
        at = (rows * width)[:, None] + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tl.store(d_value + at, lib.round_to(c * g, TYPE), mask=mask)
    product = g.to(SUM_TYPE)
    if SUMMED:
        if TABLE:
            x = _load_picked(
                value, ids, batch, at_time, columns, row_mask, column_mask, vocab, DIM, JOINED
            )
        else:
            x = _load(value, batch, at_time, columns, row_mask, column_mask, DIM, JOINED)
        product = product * x.to(SUM_TYPE)
    return product


@triton.jit
def backward_kernel(
    grad,
    values,
    coefficients,
    d_values,
    sums,
    ids,
    vocab,
    time,
    width,
    sequences,
    row_count,
    windows,
    window_width,
    row_tiles,
    column_tiles,
    SOURCES: tl.constexpr,
    FORMS: tl.constexpr,
    WRITES: tl.constexpr,
    SUMMED: tl.constexpr,
    OVER_ROWS: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
    LOOPS: tl.constexpr,
    TABLE: tl.constexpr,
    TYPE: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    DIM: tl.constexpr,
    JOINED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dV_i = c_i grad, and the sums of grad * V_i that dc_i is made of.

    There are `sequences` of `row_count` rows, whose tiles do not run over their ends: those of the
    batch, or one of all rows. With OVER_ROWS a tile's rows have one sum together, with
    OVER_COLUMNS its columns; `sums` is where they go. A program goes over all sequences, windows
    and column tiles where LOOPS says so, and adds up; else these are in the grid.
    """
    source, rest = tl.program_id(0) % SOURCES, tl.program_id(0) // SOURCES
    looped_tiles = column_tiles if LOOPS[2] else 1
    looped_windows = windows if LOOPS[1] else 1
    looped_sequences = sequences if LOOPS[0] else 1
    column_tile, rest = (
        rest % (column_tiles // looped_tiles),
        rest // (column_tiles // looped_tiles),
    )
    window, rest = rest % (windows // looped_windows), rest // (windows // looped_windows)
    row_tile, sequence = rest % row_tiles, (rest // row_tiles).to(tl.int64)
    within_sequence = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = within_sequence < row_count
    for i in tl.static_range(SOURCES):
        if source == i:
            if OVER_COLUMNS:
                total = tl.zeros((ROWS,), SUM_TYPE)
            else:
                total = tl.zeros((ROWS, BLOCK), SUM_TYPE)
            for step in range(looped_sequences * looped_windows * looped_tiles):
                within = (column_tile + step % looped_tiles) * BLOCK + tl.arange(0, BLOCK)
                head = window + step // looped_tiles % looped_windows
                rows = (sequence + step // looped_tiles // looped_windows) * row_count
                product = _visit(
                    grad, values[i], coefficients[i], d_values[i], ids, vocab, time, width,
                    rows + within_sequence, head * window_width + within, row_mask,
                    within < window_width,
                    FORMS[i], WRITES[i], SUMMED, TABLE, TYPE, SUM_TYPE, DIM, JOINED,
                )  # fmt: skip
                if OVER_COLUMNS:
                    total += tl.sum(product, 1)
                else:
                    total += product
            if SUMMED:
                _store_sums(
                    sums[i], total, sequence, row_tile, within_sequence, window, column_tile,
                    row_mask, window_width, OVER_ROWS, OVER_COLUMNS, BLOCK,
                )  # fmt: skip


@triton.jit
def _store_sums(
    sums,
    total,
    sequence,
    row_tile,
    rows,
    window,
    column_tile,
    row_mask,
    window_width,
    OVER_ROWS: tl.constexpr,
    OVER_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = sums.pointer.dtype.element_ty
    start = sums.pointer + sequence * sums.sequence + window * sums.window + column_tile * sums.tile
    within = tl.arange(0, BLOCK)
    column_mask = column_tile * BLOCK + within < window_width
    if OVER_ROWS:
        at = start + row_tile * sums.row
        if OVER_COLUMNS:
            tl.store(at, tl.sum(total, 0).to(dtype))
        else:
            tl.store(at + within, tl.sum(total, 0).to(dtype), mask=column_mask)
    else:
        rounded = lib.round_to(total.to(tl.float32), dtype)
        if OVER_COLUMNS:
            tl.store(start + rows * sums.row, rounded, mask=row_mask)
        else:
            mask = row_mask[:, None] & column_mask[None, :]
            tl.store(start + (rows * sums.row)[:, None] + within[None, :], rounded, mask=mask)


@triton.jit
def sum_kernel(
    partials,
    outs,
    groups,
    parts,
    width,
    width_tiles,
    SOURCES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """outs[i] (groups, width) = partials (SOURCES, groups, parts, width), added over parts in
    float64 and in a fixed order."""
    tile, group = tl.program_id(0) % width_tiles, tl.program_id(0) // width_tiles
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros((PARTS, BLOCK), tl.float64)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = (group.to(tl.int64) * parts + part)[:, None] * width + columns[None, :]
        there = (part < parts)[:, None] & mask[None, :]
        total += tl.load(partials + at, mask=there, other=0.0)
    found = tl.sum(total, 0).to(tl.float32)
    for i in tl.static_range(SOURCES):
        if group // groups == i:
            at = (group % groups).to(tl.int64) * width + columns
            tl.store(outs[i] + at, lib.round_to(found, outs[i].dtype.element_ty), mask=mask)


@triton.jit
def scatter_kernel(
    grad,
    gate,
    sorted_ids,
    order,
    ends,
    targets,
    out,
    vocab,
    time,
    width,
    column_tiles,
    FORM: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    DIM: tl.constexpr,
    JOINED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row targets[s] of out = sum of gate * grad over the positions order[s] .. order[ends[s] - 1],
    which hold one id; written by the program of the first of them alone."""
    column_tile, start = tl.program_id(0) % column_tiles, tl.program_id(0) // column_tiles
    picked = tl.load(sorted_ids + start)
    before = tl.load(sorted_ids + start - 1, mask=start > 0, other=-1)
    if (picked >= 0) & (picked < vocab) & ((start == 0) | (picked != before)):
        columns = column_tile * BLOCK + tl.arange(0, BLOCK)
        column_mask = columns < width
        end = tl.load(ends + start)
        total = tl.zeros((BLOCK,), SUM_TYPE)
        for first in range(start, end, ROWS):
            at = first + tl.arange(0, ROWS)
            position = tl.load(order + at, mask=at < end, other=0)
            batch, at_time = position // time, position % time
            g = _load(grad, batch, at_time, columns, at < end, column_mask, DIM, JOINED)
            weight = _coefficient(gate, batch, at_time, columns, at < end, column_mask, DIM, FORM)
            total += tl.sum(g.to(SUM_TYPE) * weight, 0)
        rounded = lib.round_to(total.to(tl.float32), out.dtype.element_ty)
        target = tl.load(targets + start)
        tl.store(out + target * width + columns, rounded, mask=column_mask)

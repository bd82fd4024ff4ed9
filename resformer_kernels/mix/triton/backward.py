"""The backward kernels of the mixing ops, and their launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton import device
from resformer_kernels._triton.launch import empty, launch
from resformer_kernels._triton.specialise import Stride
from resformer_kernels._triton.views import NOTHING, view_of
from resformer_kernels.mix.op import MixBackwardCall
from resformer_kernels.mix.record import absent_like
from resformer_kernels.mix.triton import tiles
from resformer_kernels.mix.triton.partition import Differs, Partition, differs_along, partition

_MOST_SOURCES = 4
"""Sources of one launch, each with code of its own."""
_SUMS = 1024
"""Elements of a tile of partial sums."""


class Sums(NamedTuple):
    """(Partial) sums by strides of sequence, row or row tile, window and column tile."""

    pointer: Tensor | None
    sequence: Stride
    row: Stride
    window: Stride
    tile: Stride


class Parts(NamedTuple):
    """Partial sums (sources, groups, parts, width), and how programs share them."""

    pointer: Tensor
    groups: int
    parts: int
    width: Stride
    width_tiles: int


class Gradient(NamedTuple):
    """One source's gradients: dV where `d_value` is there, dc where `sums` has a pointer."""

    source: tiles.Source
    d_value: Tensor | None
    sums: Sums


class Place(NamedTuple):
    """The first tile of a program: `rows` (ROWS,) count within a sequence."""

    sequence: Any
    window: Any
    row_tile: Any
    column_tile: Any
    rows: Any
    row_mask: Any


class Wanted(NamedTuple):
    """The gradients that one source wants, as tensors to be written."""

    source: tiles.Source
    d_value: Tensor | None
    d_coefficient: Tensor | None


@triton.jit
def _visit(grad, gradient, layout, tile, SUM_TYPE: tl.constexpr):
    """Writes a tile of dV where it is wanted; returns that of grad * V, 0 outside the masks."""
    g = tiles.load(grad, layout, tile)  # (ROWS, BLOCK)
    if gradient.d_value is not None:
        product = tiles.coefficient_over(gradient.source, layout, tile) * g
        rounded = device.round_to(product, gradient.d_value.dtype.element_ty)
        at = gradient.d_value + tiles.offsets_of(tile, layout)  # (ROWS, BLOCK)
        tl.store(at, rounded, mask=tiles.mask_of(tile))
    product = g.to(SUM_TYPE)
    if gradient.sums.pointer is not None:
        source = tiles.load_source(gradient.source, layout, tile).to(SUM_TYPE)
        product = device.product(product, source)
    return product


@triton.jit
def _store_sums(sums, total, split, place, BLOCK: tl.constexpr):
    """Stores the sums over a program's tiles: (ROWS,), or (ROWS, BLOCK) where columns differ."""
    dtype: tl.constexpr = sums.pointer.dtype.element_ty
    start = sums.pointer + place.sequence * sums.sequence + place.window * sums.window
    start += place.column_tile * sums.tile
    within = tl.arange(0, BLOCK)
    column_mask = place.column_tile * BLOCK + within < split.window
    if split.OVER_ROWS:
        at = start + place.row_tile * sums.row
        if split.OVER_COLUMNS:
            tl.store(at, tl.sum(total, 0).to(dtype))
        else:
            tl.store(at + within, tl.sum(total, 0).to(dtype), mask=column_mask)
    else:
        rounded = device.round_to(total.to(tl.float32), dtype)
        if split.OVER_COLUMNS:
            tl.store(start + place.rows * sums.row, rounded, mask=place.row_mask)
        else:
            mask = place.row_mask[:, None] & column_mask[None, :]
            at = start + (place.rows * sums.row)[:, None] + within[None, :]  # (ROWS, BLOCK)
            tl.store(at, rounded, mask=mask)


@triton.jit
def backward_kernel(
    grad,
    gradients,
    split,
    layout,
    SOURCES: tl.constexpr,
    SUM_TYPE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dV_i = c_i grad, and the sums of grad * V_i that make dc_i.

    A program loops over all sequences, windows or column tiles where `split` says so, and adds up;
    otherwise these are in the grid.
    """
    source, rest = tl.program_id(0) % SOURCES, tl.program_id(0) // SOURCES
    tiles_each = split.column_tiles if split.ALL_COLUMNS else 1
    windows_each = split.windows if split.ALL_WINDOWS else 1
    sequences_each = split.sequences if split.ALL_SEQUENCES else 1
    column_tile = rest % (split.column_tiles // tiles_each)
    rest = rest // (split.column_tiles // tiles_each)
    window = rest % (split.windows // windows_each)
    rest = rest // (split.windows // windows_each)
    row_tile, sequence = rest % split.row_tiles, (rest // split.row_tiles).to(tl.int64)
    within_sequence = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = within_sequence < split.rows
    place = Place(sequence, window, row_tile, column_tile, within_sequence, row_mask)
    for i in tl.static_range(SOURCES):
        if source == i:
            if split.OVER_COLUMNS:
                total = tl.zeros((ROWS,), SUM_TYPE)
            else:
                total = tl.zeros((ROWS, BLOCK), SUM_TYPE)
            for step in range(sequences_each * windows_each * tiles_each):
                within = (column_tile + step % tiles_each) * BLOCK + tl.arange(0, BLOCK)
                head = window + step // tiles_each % windows_each
                columns = head * split.window + within
                rows = (sequence + step // tiles_each // windows_each) * split.rows
                tile = tiles.tile_at(
                    layout, rows + within_sequence, row_mask, columns, within < split.window
                )
                product = _visit(grad, gradients[i], layout, tile, SUM_TYPE)
                if split.OVER_COLUMNS:
                    total += tl.sum(product, 1)
                else:
                    total += product
            if gradients[i].sums.pointer is not None:
                _store_sums(gradients[i].sums, total, split, place, BLOCK)


@triton.jit
def sum_kernel(
    partials,
    outs,
    SOURCES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """outs[i] (groups, width) = partials of a source, added over parts in float64 and in a fixed
    order."""
    width = partials.width
    tile = tl.program_id(0) % partials.width_tiles
    group = tl.program_id(0) // partials.width_tiles
    columns = tile * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    total = tl.zeros((PARTS, BLOCK), tl.float64)
    for first in range(0, partials.parts, PARTS):
        part = first + tl.arange(0, PARTS)
        at = (group.to(tl.int64) * partials.parts + part)[:, None] * width + columns[None, :]
        present = (part < partials.parts)[:, None] & mask[None, :]  # (PARTS, BLOCK)
        total += tl.load(partials.pointer + at, mask=present, other=0.0)
    found = tl.sum(total, 0).to(tl.float32)
    for i in tl.static_range(SOURCES):
        if group // partials.groups == i:
            at = (group % partials.groups).to(tl.int64) * width + columns
            tl.store(outs[i] + at, device.round_to(found, outs[i].dtype.element_ty), mask=mask)


def mix_values_backward(back: MixBackwardCall) -> list[Tensor]:
    """Every dV_i, then every dc_i; those not in grad_mask have no elements."""
    grad, count = back.grad, len(back.call.values)
    masks = zip(back.grad_mask[:count], back.grad_mask[count:], strict=True)
    gradients = []
    for (value, c, number), (wants_value, wants_c) in zip(back.call.terms, masks, strict=True):
        source = tiles.source_of(view_of(value) if wants_c else NOTHING, c, number)
        d_value = empty(grad, grad.shape) if wants_value else None
        d_coefficient = empty(c, c.shape) if c is not None and wants_c else None
        gradients.append(Wanted(source, d_value, d_coefficient))
    run_backward(grad, gradients)
    return [
        *(absent_like(grad) if w.d_value is None else w.d_value for w in gradients),
        *(
            absent_like(c) if w.d_coefficient is None else w.d_coefficient
            for w, c in zip(gradients, back.call.coefficients, strict=True)
        ),
    ]


def run_backward(grad: Tensor, gradients: list[Wanted]) -> None:
    """Write the gradients that are wanted, coefficients that differ alike in one launch."""
    shape = tiles.shape_of(grad)
    alike: dict[Differs | None, list[Wanted]] = {}
    for wanted in gradients:
        if wanted.d_coefficient is not None and grad.numel() == 0:
            wanted.d_coefficient.zero_()
        elif wanted.d_value is not None or wanted.d_coefficient is not None:
            c = wanted.d_coefficient
            alike.setdefault(None if c is None else differs_along(c), []).append(wanted)
    for differs, group in alike.items():
        parts = partition(shape, differs)
        for first in range(0, len(group), _MOST_SOURCES):
            _launch(grad, parts, group[first : first + _MOST_SOURCES])


def _launch(grad: Tensor, parts: Partition, gradients: list[Wanted]) -> None:
    results = [wanted.d_coefficient for wanted in gradients]
    sums, partials = results, None
    if results[0] is not None and parts.parts:
        size = parts.split.sequences * parts.parts * parts.sum_width
        partials = empty(grad, (len(gradients), size), torch.float64)
        sums = list(partials.unbind())
    values = (view_of(grad), *(wanted.source.value for wanted in gradients))
    launch(
        backward_kernel,
        (parts.programs * len(gradients),),
        grad.device,
        grad=view_of(grad),
        gradients=tuple(
            Gradient(wanted.source, wanted.d_value, Sums(x, *parts.strides))
            for wanted, x in zip(gradients, sums, strict=True)
        ),
        split=parts.split,
        layout=tiles.layout_of(tiles.shape_of(grad), values),
        SOURCES=len(gradients),
        SUM_TYPE=tiles.sum_type(grad.dtype),
        ROWS=parts.size.rows,
        BLOCK=parts.size.columns,
        num_warps=4,
    )
    if partials is not None:
        _add_parts(partials, parts, results)


def _add_parts(partials: Tensor, parts: Partition, outs: list[Tensor | None]) -> None:
    size = tiles.size_of(parts.parts, parts.sum_width, widest=64, tallest=_SUMS)
    width_tiles = tiles.tiles_of(parts.sum_width, size.columns)
    launch(
        sum_kernel,
        (len(outs) * parts.split.sequences * width_tiles,),
        partials.device,
        partials=Parts(partials, parts.split.sequences, parts.parts, parts.sum_width, width_tiles),
        outs=tuple(outs),
        SOURCES=len(outs),
        PARTS=min(size.rows, _SUMS // size.columns),
        BLOCK=size.columns,
        num_warps=4,
    )

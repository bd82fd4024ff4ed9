"""The mixing ops on Triton: outputs and scratch, grids and launches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton import device as lib
from resformer_kernels._triton.views import (
    NOTHING,
    Coefficient,
    View,
    coefficient_of,
    form_over_tile,
    view_of,
)
from resformer_kernels.mix.triton import kernels, plan
from resformer_kernels.mix.triton.plan import Shape

_AT_ONCE = 32
"""Sources of one forward launch; more go on from a float32 sum."""
_ALIKE_AT_ONCE = 4
"""Sources of one backward launch, each with code of its own."""
_SUMS = 1024
"""Elements of a tile of partial sums."""


class Ids(NamedTuple):
    """The table's row of each (batch, time)."""

    pointer: Tensor | None
    batch: int
    time: int


class Sums(NamedTuple):
    """Where (partial) sums go, by strides of sequence, row or row tile, window and column tile."""

    pointer: Tensor | None
    sequence: int
    row: int
    window: int
    tile: int


class Source(NamedTuple):
    """One source of a mix, and how its coefficient differs over a tile."""

    value: View
    coefficient: Coefficient
    form: int


_NO_IDS = Ids(None, 0, 0)
_NO_SUMS = Sums(None, 0, 0, 0, 0)


def _present(tensor: Tensor) -> bool:
    return not (tensor.dim() == 1 and tensor.numel() == 0)


def _shape_of(v: Tensor) -> Shape:
    return Shape(*v.shape) if v.dim() == 4 else Shape(1, *v.shape)


def _table_view(table: Tensor) -> View:
    return View(table, 0, table.stride(0), table.stride(1))


def _ids_of(token_ids: Tensor) -> Ids:
    return Ids(token_ids, token_ids.stride(0) if token_ids.dim() == 2 else 0, token_ids.stride(-1))


def _coefficient_of(tensor: Tensor | None, number: float) -> tuple[Coefficient, int]:
    """And its form over a tile, which has tokens by heads and channels."""
    c = coefficient_of(tensor, number)
    return c, form_over_tile(c, c.batch != 0 or c.time != 0, c.head != 0 or c.column != 0)


def _joined(views: Iterable[View], dim: int) -> bool:
    return all(view.pointer is None or view.head == dim for view in views)


def _kept(coefficient: Tensor) -> tuple[bool, bool, bool, bool]:
    batch, time, head, dim = (size > 1 for size in (1, *coefficient.shape)[-4:])
    return batch, time, head, dim


def _type_of(dtype: torch.dtype) -> tl.dtype:
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return types[dtype]


def _sum_type(dtype: torch.dtype) -> tl.dtype:
    # Products of float32 are exact in float64, those of 16-bit numbers in float32.
    return tl.float64 if dtype is torch.float32 else tl.float32


def mix_values_forward(
    values: Sequence[Tensor], coefficients: Sequence[Tensor], numbers: Sequence[float]
) -> Tensor:
    """The implementation of the op: its arguments, in the schema's order."""
    sources = [
        Source(view_of(value), *_coefficient_of(c if _present(c) else None, number))
        for value, c, number in zip(values, coefficients, numbers, strict=True)
    ]
    return _forward(values[0], sources, _NO_IDS, 0)


def mix_value_embedding_forward(
    v: Tensor, table: Tensor, token_ids: Tensor, gate: Tensor | None, gate_value: float
) -> Tensor:
    """The implementation of the op: its arguments, in the schema's order."""
    sources = [
        Source(view_of(v), *_coefficient_of(None, 1.0)),
        Source(_table_view(table), *_coefficient_of(gate, gate_value)),
    ]
    return _forward(v, sources, _ids_of(token_ids), table.shape[0])


def _forward(like: Tensor, sources: list[Source], ids: Ids, vocab: int) -> Tensor:
    so_far: Tensor | None = None
    for first in range(0, len(sources), _AT_ONCE):
        last = first + _AT_ONCE >= len(sources)
        out = lib.empty(like, like.shape, like.dtype if last else torch.float32)
        _launch_forward(sources[first : first + _AT_ONCE], ids, so_far, out, vocab)
        so_far = out
    return out


def _launch_forward(
    sources: list[Source], ids: Ids, so_far: Tensor | None, out: Tensor, vocab: int
) -> None:
    shape, count = _shape_of(out), len(sources)
    tile = plan.tile_of(shape.rows, shape.width)
    # Few numbers of sources, few compilations: what is missing is masked and never read.
    room = 1 << (count - 1).bit_length()
    absent = Source(sources[0].value, *_coefficient_of(None, 0.0))
    sources = sources + [absent] * (room - count)
    column_tiles = plan.tiles_of(shape.width, tile.columns)
    lib.launch(
        kernels.forward_kernel,
        (plan.tiles_of(shape.rows, tile.rows) * column_tiles,),
        out.device,
        values=tuple(source.value for source in sources),
        coefficients=tuple(source.coefficient for source in sources),
        ids=ids,
        so_far=so_far,
        out=out,
        count=count,
        vocab=vocab,
        row_count=shape.rows,
        time=shape.time,
        width=shape.width,
        column_tiles=column_tiles,
        SOURCES=room,
        FORMS=tuple(source.form for source in sources),
        TABLE=ids.pointer is not None,
        TYPE=_type_of(out.dtype),
        DIM=shape.dim,
        JOINED=_joined((source.value for source in sources), shape.dim),
        ROWS=tile.rows,
        BLOCK=tile.columns,
        num_warps=4,
    )


class _Wanted(NamedTuple):
    """One source's gradients: dV if `d_value` is there, dc if `d_coefficient` is."""

    source: Source
    d_value: Tensor | None
    d_coefficient: Tensor | None


def mix_values_backward(
    grad: Tensor,
    values: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    numbers: Sequence[float],
    grad_mask: Sequence[int],
) -> list[Tensor]:
    """The implementation of the op: its arguments, in the schema's order."""
    count = len(values)
    wanted, results = [], []
    for i in range(count):
        value = view_of(values[i]) if grad_mask[count + i] else NOTHING
        c = coefficients[i] if _present(coefficients[i]) else None
        d_value = lib.empty(grad, grad.shape) if grad_mask[i] else None
        d_coefficient = lib.empty(c, c.shape) if c is not None and grad_mask[count + i] else None
        wanted.append(
            _Wanted(Source(value, *_coefficient_of(c, numbers[i])), d_value, d_coefficient)
        )
    _backward(grad, wanted, _NO_IDS, 0)
    results += [grad.new_empty((0,)) if w.d_value is None else w.d_value for w in wanted]
    results += [
        c.new_empty((0,)) if w.d_coefficient is None else w.d_coefficient
        for w, c in zip(wanted, coefficients, strict=True)
    ]
    return results


def _backward(grad: Tensor, wanted: list[_Wanted], ids: Ids, vocab: int) -> None:
    shape = _shape_of(grad)
    alike: dict[Any, list[_Wanted]] = {}
    for w in wanted:
        if w.d_coefficient is not None and grad.numel() == 0:
            w.d_coefficient.zero_()
        elif w.d_value is not None or w.d_coefficient is not None:
            kept = None if w.d_coefficient is None else _kept(w.d_coefficient)
            alike.setdefault(kept, []).append(w)
    for kept, group in alike.items():
        how = plan.cut(shape, kept)
        for first in range(0, len(group), _ALIKE_AT_ONCE):
            _launch_backward(grad, shape, how, group[first : first + _ALIKE_AT_ONCE], ids, vocab)


def _launch_backward(
    grad: Tensor, shape: Shape, how: plan.Backward, wanted: list[_Wanted], ids: Ids, vocab: int
) -> None:
    results = [w.d_coefficient for w in wanted]
    summed = results[0] is not None
    sums, partials = results, None
    if summed and how.over_rows:
        size = how.sequences * how.parts * how.sum_width
        partials = lib.empty(grad, (len(wanted), size), torch.float64)
        sums = list(partials.unbind())
    lib.launch(
        kernels.backward_kernel,
        (how.programs() * len(wanted),),
        grad.device,
        grad=view_of(grad),
        values=tuple(w.source.value for w in wanted),
        coefficients=tuple(w.source.coefficient for w in wanted),
        d_values=tuple(w.d_value for w in wanted),
        sums=tuple(Sums(x, *how.strides) if summed else _NO_SUMS for x in sums),
        ids=ids,
        vocab=vocab,
        time=shape.time,
        width=shape.width,
        sequences=how.sequences,
        row_count=how.rows,
        windows=how.windows,
        window_width=how.window,
        row_tiles=how.row_tiles,
        column_tiles=how.column_tiles,
        SOURCES=len(wanted),
        FORMS=tuple(w.source.form for w in wanted),
        WRITES=tuple(w.d_value is not None for w in wanted),
        SUMMED=summed,
        OVER_ROWS=how.over_rows,
        OVER_COLUMNS=how.over_columns,
        LOOPS=how.loops,
        TABLE=ids.pointer is not None,
        TYPE=_type_of(grad.dtype),
        SUM_TYPE=_sum_type(grad.dtype),
        DIM=shape.dim,
        JOINED=_joined((view_of(grad), *(w.source.value for w in wanted)), shape.dim),
        ROWS=how.tile.rows,
        BLOCK=how.tile.columns,
        num_warps=4,
    )
    if partials is not None:
        _add_parts(partials, how, results)


def _add_parts(partials: Tensor, how: plan.Backward, outs: list[Tensor | None]) -> None:
    tile = plan.tile_of(how.parts, how.sum_width, widest=64, tallest=_SUMS)
    width_tiles = plan.tiles_of(how.sum_width, tile.columns)
    lib.launch(
        kernels.sum_kernel,
        (len(outs) * how.sequences * width_tiles,),
        partials.device,
        partials=partials,
        outs=tuple(outs),
        groups=how.sequences,
        parts=how.parts,
        width=how.sum_width,
        width_tiles=width_tiles,
        SOURCES=len(outs),
        PARTS=min(tile.rows, _SUMS // tile.columns),
        BLOCK=tile.columns,
        num_warps=4,
    )


def mix_value_embedding_backward(
    grad: Tensor,
    table: Tensor,
    token_ids: Tensor,
    gate: Tensor | None,
    gate_value: float,
    grad_mask: int,
) -> tuple[Tensor, Tensor]:
    """The implementation of the op: its arguments, in the schema's order."""
    d_table, d_gate = table.new_empty((0,)), (grad if gate is None else gate).new_empty((0,))
    if grad_mask & 2:
        assert gate is not None
        d_gate = lib.empty(gate, gate.shape)
        source = Source(_table_view(table), *_coefficient_of(gate, gate_value))
        _backward(grad, [_Wanted(source, None, d_gate)], _ids_of(token_ids), table.shape[0])
    if grad_mask & 1:
        d_table = table.new_zeros(table.shape)
        picked, order = _sorted(token_ids)
        _scatter(grad, _coefficient_of(gate, gate_value), picked, order, picked, d_table, table)
    return d_table, d_gate


def mix_value_embedding_backward_sparse(
    grad: Tensor, table: Tensor, token_ids: Tensor, gate: Tensor | None, gate_value: float
) -> tuple[Tensor, Tensor]:
    """The implementation of the op: its arguments, in the schema's order. How many rows there are
    is data, for which the host waits."""
    picked, order = _sorted(token_ids)
    ids, slots = torch.unique_consecutive(picked, return_inverse=True)
    rows = lib.empty(table, (ids.shape[0], *table.shape[1:]))
    _scatter(grad, _coefficient_of(gate, gate_value), picked, order, slots, rows, table)
    return ids, rows


def _sorted(token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(ids in ascending order, the position of each); equal ids keep their order."""
    picked, order = torch.sort(token_ids.flatten().long(), stable=True)
    return picked, order


def _scatter(
    grad: Tensor,
    gate: tuple[Coefficient, int],
    picked: Tensor,
    order: Tensor,
    targets: Tensor,
    out: Tensor,
    table: Tensor,
) -> None:
    shape = _shape_of(grad)
    tile = plan.tile_of(picked.shape[0], shape.width, widest=512, tallest=8)
    column_tiles = plan.tiles_of(shape.width, tile.columns)
    lib.launch(
        kernels.scatter_kernel,
        (picked.shape[0] * column_tiles,),
        grad.device,
        grad=view_of(grad),
        gate=gate[0],
        sorted_ids=picked,
        order=order,
        ends=torch.searchsorted(picked, picked, right=True),
        targets=targets,
        out=out,
        vocab=table.shape[0],
        time=shape.time,
        width=shape.width,
        column_tiles=column_tiles,
        FORM=gate[1],
        SUM_TYPE=_sum_type(grad.dtype),
        DIM=shape.dim,
        JOINED=_joined((view_of(grad),), shape.dim),
        ROWS=tile.rows,
        BLOCK=tile.columns,
        num_warps=4,
    )

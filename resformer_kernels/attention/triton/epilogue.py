"""The epilogue's gradient on a GPU, in one pass over rows before the other kernels of backward; and
the epilogue alone, after a kernel that has none. See `attention.epilogue` for the equations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._core.strides import unit_stride
from resformer_kernels._triton.device import NUMBER, PER_ROW, round_to, widen
from resformer_kernels._triton.launch import empty, launch
from resformer_kernels._triton.views import view_of
from resformer_kernels.attention.epilogue_op import EpilogueBackwardCall, EpilogueCall
from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.attention.triton.finish import finish_rows
from resformer_kernels.attention.triton.forward import clear_tail
from resformer_kernels.attention.triton.keys import summed_to
from resformer_kernels.attention.triton.loads import (
    Mixed,
    Source,
    key_cells,
    load_row_factor,
    load_row_tile,
    load_rows,
    row_cells,
    store_rows,
)
from resformer_kernels.attention.triton.problem import (
    epilogue_of,
    lse_view,
    padded,
    shared,
    values,
)
from resformer_kernels.attention.triton.tiles import Limits, one_head, place


class Opened(NamedTuple):
    """The gradients of what the epilogue is given."""

    y: Tensor
    value: Tensor | None
    """Of V' by way of the epilogue, on top of `grad_mixed`. Packed, what lies after the last
    sequence is not written, here and in y."""
    dots: Tensor
    """d_y.y of each row, as the LSE lies."""
    exclusive: Tensor | None
    out_gate: Tensor | None


@triton.jit
def epilogue_kernel(y, values, out, epilogue, tiles, geometry, q_len, k_len, sizes):
    """out of y, ROWS rows of one KV head."""
    ROWS: tl.constexpr = sizes.ROWS
    tile = tl.program_id(0) % tiles
    index = tl.program_id(0) // tiles
    limits = Limits(q_len, k_len, 0, 0)
    at = place(geometry, limits, index // geometry.heads, index % geometry.heads)
    rows = tile * ROWS + tl.arange(0, ROWS)
    # (ROWS, BLOCK_V)
    tile_y = load_row_tile(
        Source(y, None, geometry, sizes.DIM_V, sizes.BLOCK_V), at, tile * ROWS, ROWS, True
    )
    out_tile = finish_rows(
        widen(tile_y),
        Mixed(
            Source(values.v, None, geometry, sizes.DIM_V, sizes.BLOCK_V),
            Source(values.v_first, None, geometry, sizes.DIM_V, sizes.BLOCK_V),
            values,
        ),
        epilogue,
        at,
        rows,
    )
    store_rows(out_tile, Source(out, None, geometry, sizes.DIM_V, sizes.BLOCK_V), at, rows)


@triton.jit
def _load_tile(pointers, rows, count, sizes):
    """(ROWS, BLOCK_V) in float32 from the first column on, zero in rows from `count` on."""
    columns = tl.arange(0, sizes.BLOCK_V)
    cells = pointers[:, None] + columns[None, :]
    return widen(
        load_rows(cells, rows, count, columns, Source(None, None, None, sizes.DIM_V, sizes.BLOCK_V))
    )


@triton.jit
def _store_tile(tile, pointers, rows, count, sizes):
    columns = tl.arange(0, sizes.BLOCK_V)
    tl.store(
        pointers[:, None] + columns[None, :],
        round_to(tile, pointers.dtype.element_ty),
        mask=(rows < count)[:, None] & (columns < sizes.DIM_V)[None, :],
    )


@triton.jit
def epilogue_backward_kernel(
    grad_out,
    kept,
    value,
    grad_value,
    dy,
    dvalue,
    dots,
    d_exclusive,
    d_gate,
    epilogue,
    tiles,
    geometry,
    q_len,
    k_len,
    sizes,
    UNGATED: tl.constexpr,
):
    """The epilogue's gradients at ROWS positions of one KV head, for all of its query heads.

    `kept` is out, or u where UNGATED, or y where UNGATED and there is no `epilogue.along`. The
    positions of a sequence are those of its queries or its keys, whichever are more: both end at
    the last.
    """
    ROWS: tl.constexpr = sizes.ROWS
    EXCLUDES: tl.constexpr = epilogue.EXCLUDES
    WIDTH: tl.constexpr = sizes.DIM_V
    tile = tl.program_id(0) % tiles
    index = tl.program_id(0) // tiles
    limits = Limits(q_len, k_len, 0, 0)
    at = place(geometry, limits, index // geometry.heads, index % geometry.heads)
    before = at.shift * 0
    if EXCLUDES:
        before = tl.maximum(at.shift, 0)
    if tile * ROWS >= at.q_len + before:
        return
    queries = tile * ROWS + tl.arange(0, ROWS) - before
    keys = queries + at.shift
    # As rows of one head. What is no query, or no key, lies past the last.
    rows = tl.where(queries >= 0, queries, at.q_len)
    asked = rows < at.q_len
    columns = tl.arange(0, sizes.BLOCK_V)
    if EXCLUDES:
        # (ROWS, BLOCK_V)
        standing = tl.where(keys >= 0, rows, at.q_len)
        w = _load_tile(key_cells(value, at, keys), standing, at.q_len, sizes)
        size = tl.sum(w * w, 1)
        over = tl.math.div_rn(1.0, tl.maximum(size, epilogue.least))
        above = tl.where(size > epilogue.least, 2.0, 0.0)
        dw = tl.zeros([ROWS, sizes.BLOCK_V], tl.float32)
    for member in tl.range(geometry.GROUP):
        one = one_head(at, at.head * geometry.GROUP + member)
        # (ROWS, BLOCK_V)
        given = _load_tile(row_cells(grad_out, one, rows, 1), rows, at.q_len, sizes)
        u = _load_tile(row_cells(kept, one, rows, 1), rows, at.q_len, sizes)
        du = given
        if epilogue.gate.FORM != NUMBER:
            du = given * load_row_factor(epilogue.gate, one, rows, columns, 1, WIDTH)
        back = du
        if EXCLUDES:
            part = load_row_factor(epilogue.exclusive, one, rows, columns, 1, WIDTH)
            if epilogue.along.pointer is None:
                along = tl.sum(u * w, 1) * over
                u -= part * along[:, None] * w
            else:
                along = tl.load(row_cells(epilogue.along, one, rows, 1), mask=asked, other=0.0)
            c = tl.sum(du * w, 1)
            back -= part * (c * over)[:, None] * w
            if d_exclusive.pointer is not None:
                tl.store(row_cells(d_exclusive, one, rows, 1), -along * c, mask=asked)
        # (t, K) is (du, u), or (dout, out).
        t = du
        if not UNGATED:
            t = given
        tl.store(row_cells(dots, one, rows, 1), tl.sum(t * u, 1), mask=asked)
        if dvalue.pointer is not None:
            of_kept = tl.sum(t * w, 1) * over
            of_own = (along * c * over)[:, None] * (part - above[:, None])
            dw -= part * (along[:, None] * du + of_kept[:, None] * u + of_own * w)
        if d_gate.pointer is not None:
            cells = row_cells(d_gate, one, rows, 1)
            if epilogue.gate.FORM == PER_ROW:
                tl.store(cells, tl.sum(given * u, 1), mask=asked)
            else:
                _store_tile(given * u, cells, rows, at.q_len, sizes)
        _store_tile(back, row_cells(dy, one, rows, 1), rows, at.q_len, sizes)
    if dvalue.pointer is not None:
        keys = tl.where(keys >= 0, keys, at.k_len)
        if grad_value.pointer is not None:
            dw += _load_tile(key_cells(grad_value, at, keys), keys, at.k_len, sizes)
        _store_tile(dw, key_cells(dvalue, at, keys), keys, at.k_len, sizes)


def epilogue_gradients(
    call: AttentionCall,
    grad_out: Tensor,
    kept: Tensor,
    value: Tensor,
    along: Tensor | None,
    grad_value: Tensor | None,
    wanted: dict[str, bool],
    *,
    ungated: bool,
) -> Opened:
    """What `wanted` names of "value", "exclusive" and "out_gate", and the gradient of y.

    `kept` is out; where `ungated` it is u, or y where nothing gives `along`. `value` is V'.
    """
    q = call.q
    dy = empty(kept, kept.shape)
    dots = empty(q, (*q.shape[:-3], q.shape[-2], q.shape[-3]), torch.float32)
    dvalue = empty(value, value.shape) if wanted["value"] and call.excludes else None
    sums = {
        name: _sums(call, leaf if wanted[name] else None)
        for name, leaf in (("exclusive", call.exclusive), ("out_gate", call.out_gate))
    }
    size = max(16, 2048 // padded(value.shape[-1]))
    positions = max(call.max_seqlen_q, call.max_seqlen_k) if call.excludes else call.max_seqlen_q
    tiles = -(-positions // size)
    launch(
        epilogue_backward_kernel,
        (call.sequences * call.kv_heads * tiles,),
        q.device,
        grad_out=view_of(unit_stride(grad_out)),
        kept=view_of(kept),
        value=view_of(value),
        grad_value=view_of(None if grad_value is None else unit_stride(grad_value)),
        dy=view_of(dy),
        dvalue=view_of(dvalue),
        dots=lse_view(dots),
        d_exclusive=view_of(sums["exclusive"]),
        d_gate=view_of(sums["out_gate"]),
        epilogue=epilogue_of(call, along),
        tiles=tiles,
        UNGATED=ungated,
        num_warps=4,
        **_placed(call, size),
    )
    if call.packed:
        # Others' tiles reach past the last sequence.
        clear_tail(call.cu_seqlens_q, dy)
    found = (
        None if x is None or leaf is None else summed_to(x, leaf)
        for x, leaf in ((sums["exclusive"], call.exclusive), (sums["out_gate"], call.out_gate))
    )
    return Opened(dy, dvalue, dots, *found)


def _placed(call: AttentionCall, rows: int) -> dict[str, Any]:
    """Where sequences and heads lie, whatever the window."""
    found = shared(call._replace(window_left=-1, window_right=-1), rows, 0)
    return {name: found[name] for name in ("geometry", "q_len", "k_len", "sizes")}


def _sums(call: AttentionCall, leaf: Tensor | None) -> Tensor | None:
    """Room for the terms of a factor's gradient: one a row, or one a channel too.

    In float32, but for a gate of the output's shape: its own terms are its gradient.
    """
    if leaf is None:
        return None
    shape = (*call.q.shape[:-1], leaf.shape[-1])
    whole = leaf.shape[-1] != 1 and leaf.shape == shape
    # Some packed rows belong to no sequence.
    make = torch.Tensor.new_zeros if call.packed else empty
    return make(call.q, shape, dtype=leaf.dtype if whole else torch.float32)


def forward(given: EpilogueCall) -> Tensor:
    """The op of the epilogue alone."""
    call = given.attention()
    out = empty(given.y, given.y.shape)
    size = max(16, 4096 // padded(out.shape[-1]))
    tiles = -(-call.max_rows // size)
    launch(
        epilogue_kernel,
        (call.sequences * call.kv_heads * tiles,),
        out.device,
        y=view_of(given.y),
        values=values(call),
        out=view_of(out),
        epilogue=epilogue_of(call),
        tiles=tiles,
        num_warps=4,
        **_placed(call, size),
    )
    if call.packed:
        clear_tail(call.cu_seqlens_q, out)
    return out


def backward(given: EpilogueBackwardCall) -> tuple[Tensor, ...]:
    """The gradients of the epilogue alone, of its leaves."""
    call = given.call.attention()
    wanted = given.wanted()
    found = epilogue_gradients(
        call, given.grad_out, given.call.y, call.value, None, None, wanted, ungated=True
    )
    if call.packed and found.value is not None:
        clear_tail(call.cu_seqlens_k, found.value)
    return given.results({name: getattr(found, name) for name, want in wanted.items() if want})

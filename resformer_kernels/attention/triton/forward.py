"""Forward on a GPU: out = softmax(scale Q K^T ...) V' and its epilogue, a tile of rows a program.

V' = lambda_v V + lambda_first V1 (arXiv 2410.17897) is mixed in the loop over tiles of keys, or by
`mix_kernel` before it: the same function of the same numbers, so the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.device import dot, round_to
from resformer_kernels._triton.launch import capability, empty, launch
from resformer_kernels._triton.specialise import Stride
from resformer_kernels._triton.views import view_of
from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.attention.triton import configs
from resformer_kernels.attention.triton.finish import finish_rows
from resformer_kernels.attention.triton.loads import (
    Mixed,
    Source,
    key_pointers,
    load_keys,
    load_row_tile,
    load_values,
    row_cells,
    store_rows,
)
from resformer_kernels.attention.triton.problem import (
    Epilogue,
    config_of,
    descriptor_of,
    epilogue_of,
    lse_view,
    padded,
    shared,
    sizes,
    values,
)
from resformer_kernels.attention.triton.softmax import NO_BIAS, close_rows, scores, softmax_step
from resformer_kernels.attention.triton.tiles import (
    Limits,
    Place,
    narrowed,
    phase_span,
    scheduled,
    seen_by_rows,
    spans_of_rows,
    tile_start,
    work_of,
)


@triton.jit
def forward_kernel(
    q,
    k,
    values,
    out,
    lse,
    epilogue,
    sinks,
    work,
    k_descriptor,
    v_descriptor,
    first_descriptor,
    scoring,
    geometry,
    q_len,
    k_len,
    window_left,
    window_right,
    sizes,
    FINISHES: tl.constexpr,
):
    """One tile of ROWS rows of one KV head. `lse.pointer` and `sinks` may be None, and `epilogue`
    where FINISHES is false: Triton cannot ask that of a record whose own records hold a None."""
    ROWS: tl.constexpr = sizes.ROWS
    KEYS: tl.constexpr = sizes.KEYS
    tile, at = scheduled(
        work,
        geometry,
        Limits(q_len, k_len, window_left, window_right),
        geometry.HAS_RIGHT and not geometry.HAS_LEFT,
    )
    if tile * ROWS >= at.count:
        return
    # (ROWS, BLOCK_K)
    q_tile = load_row_tile(
        Source(q, None, geometry, sizes.DIM_K, sizes.BLOCK_K), at, tile * ROWS, ROWS, True
    )
    rows, spans = spans_of_rows(tile, at, geometry, sizes)
    spans = narrowed(spans, work, tile, at, scoring.BIAS)
    seen = seen_by_rows(rows, at, scoring, geometry)

    # (ROWS, BLOCK_V)
    acc = tl.zeros([ROWS, sizes.BLOCK_V], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for phase in tl.static_range(
        2 if scoring.BIAS != NO_BIAS else 0 if geometry.HAS_LEFT else 1, 3
    ):
        start, stop = phase_span(spans, phase)
        for step in tl.range(start, stop):
            key = tile_start(step, work, tile, at, KEYS, scoring.BIAS)
            # Keys past the last one need no zeros: their scores are masked, whatever they are.
            # (KEYS, BLOCK_K)
            k_tile = load_keys(
                Source(k, k_descriptor, geometry, sizes.DIM_K, sizes.BLOCK_K),
                at,
                key,
                KEYS,
                phase != 1,
                False,
            )
            # (ROWS, KEYS)
            product = dot(q_tile, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32))
            keys = key + tl.arange(0, KEYS)
            x, _slope = scores(product, keys[None, :], seen, scoring, phase != 1)
            p, peak, total, acc = softmax_step(x, peak, total, acc, scoring)
            # (KEYS, BLOCK_V)
            v_tile = load_values(
                Mixed(
                    Source(values.v, v_descriptor, geometry, sizes.DIM_V, sizes.BLOCK_V),
                    Source(values.v_first, first_descriptor, geometry, sizes.DIM_V, sizes.BLOCK_V),
                    values,
                ),
                at,
                key,
                KEYS,
                phase != 1,
            )
            acc = dot(round_to(p, v_tile.dtype), v_tile, acc)

    heads = at.head * geometry.GROUP + rows % geometry.GROUP
    factor, logarithm = close_rows(peak, total, sinks, heads, scoring.PRECISE, scoring.NATURAL)
    out_tile = acc * factor[:, None]
    if FINISHES:
        # Plus 0, which the compiler does not know: else it would keep what it knows of the rows in
        # registers throughout the loops, and spill.
        rows += tl.minimum(spans.end, 0)
        out_tile = finish_rows(
            out_tile,
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
    if lse.pointer is not None:
        tl.store(row_cells(lse, at, rows, geometry.GROUP), logarithm, mask=rows < at.count)


def forward(call: AttentionCall, inline: bool | None = None) -> tuple[Tensor, ...]:
    """The forward op; `inline` says where V' is mixed, in place of the table of configurations."""
    q, value = call.q, call.value
    out = empty(q, (*q.shape[:-1], value.shape[-1]))
    ungated = empty(q, out.shape) if call.return_ungated else None
    lse = _row_numbers(call, -torch.inf) if call.return_lse else None
    along = _row_numbers(call, 0.0) if call.return_along else None
    if inline is None:
        dim = padded(value.shape[-1])
        inline = configs.mixes_inline(capability(q.device), dim, call.max_rows)
    mixed = None
    if call.mixes and (call.return_mixed_value or not inline):
        mixed = premix(call)
    epilogue = None if call.plain else epilogue_of(call, along, ungated)
    _attend(call, out, lse, mixed, epilogue)
    for rows in (out, ungated) if call.packed else ():
        if rows is not None:
            clear_tail(call.cu_seqlens_q, rows)
    if not call.return_mixed_value:
        mixed = value.new_empty((0,))
    elif mixed is None:
        # Nothing was mixed: a copy, zero after the last sequence.
        mixed = value.clone(memory_format=torch.contiguous_format)
        if call.packed:
            clear_tail(call.cu_seqlens_k, mixed)
    return (
        out,
        q.new_empty((0,), dtype=torch.float32) if lse is None else lse,
        mixed,
        q.new_empty((0,), dtype=torch.float32) if along is None else along,
        q.new_empty((0,)) if ungated is None else ungated,
    )


def _row_numbers(call: AttentionCall, outside: float) -> Tensor:
    """Room for a float32 of each row; packed rows that belong to no sequence hold `outside`."""
    *batch, time, heads, _ = call.q.shape
    if call.packed:
        return call.q.new_full((heads, time), outside, dtype=torch.float32)
    return empty(call.q, (*batch, heads, time), torch.float32)


def _attend(
    call: AttentionCall,
    out: Tensor,
    lse: Tensor | None,
    mixed: Tensor | None,
    epilogue: Epilogue | None,
) -> None:
    sources = values(call, mixed)
    config = config_of(call, "forward_inline" if sources.MIXES.value else "forward")
    arguments = shared(call, config.rows, config.keys)
    block_k, block_v = (arguments["sizes"].BLOCK_K.value, arguments["sizes"].BLOCK_V.value)
    work = work_of(call, config, by_rows=True)
    launch(
        forward_kernel,
        (call.sequences * call.kv_heads * work.tiles,),
        call.q.device,
        q=view_of(call.q),
        k=view_of(call.k),
        values=sources,
        out=view_of(out),
        lse=lse_view(lse),
        epilogue=epilogue,
        FINISHES=epilogue is not None,
        sinks=call.sinks,
        work=work,
        k_descriptor=descriptor_of(call.k, config.keys, block_k),
        v_descriptor=descriptor_of(sources.v.pointer, config.keys, block_v),
        first_descriptor=descriptor_of(sources.v_first.pointer, config.keys, block_v),
        num_warps=config.warps,
        num_stages=config.stages,
        **arguments,
    )


@triton.jit
def mix_kernel(values, out, cu_k, k_len, heads, sequences, sizes, PACKED: tl.constexpr):
    """V' of KEYS keys of one head and batch entry; zeros where no sequence lies."""
    KEYS: tl.constexpr = sizes.KEYS
    tiles = tl.cdiv(k_len, KEYS)
    program = tl.program_id(0)
    head = program % heads
    key = program // heads % tiles * KEYS
    batch = program // heads // tiles
    count = k_len
    if PACKED:
        count = tl.load(cu_k + sequences)
    at = Place(batch, batch, head, 0, 0, 0, 0, count, 0, 0, 0, 0)
    # (KEYS, BLOCK_V)
    tile = load_values(
        Mixed(
            Source(values.v, None, None, sizes.DIM_V, sizes.BLOCK_V),
            Source(values.v_first, None, None, sizes.DIM_V, sizes.BLOCK_V),
            values,
        ),
        at,
        key,
        KEYS,
        True,
    )
    keys = key + tl.arange(0, KEYS)
    columns = tl.arange(0, sizes.BLOCK_V)
    inside = (keys < k_len)[:, None] & (columns < sizes.DIM_V)[None, :]
    tl.store(key_pointers(out, at, keys, columns), tile, mask=inside)


def premix(call: AttentionCall) -> Tensor:
    """V', mixed by a kernel of its own."""
    value = call.value
    mixed = empty(value, value.shape)
    *batch, time, heads, dim = value.shape
    keys = max(16, 4096 // padded(dim))
    launch(
        mix_kernel,
        ((batch[0] if batch else 1) * heads * -(-time // keys),),
        value.device,
        values=values(call),
        out=view_of(mixed),
        cu_k=call.cu_seqlens_k,
        k_len=time,
        heads=heads,
        sequences=call.sequences,
        sizes=sizes(call, 0, keys),
        PACKED=call.packed,
        num_warps=4,
    )
    return mixed


class Packed(NamedTuple):
    """A contiguous packed tensor, and the number of its sequences."""

    pointer: Tensor
    sequences: int
    total: int
    row_size: Stride


@triton.jit
def clear_tail_kernel(x, cu_seqlens, BLOCK: tl.constexpr):
    """Zeros for the rows that lie after the last sequence."""
    at = tl.load(cu_seqlens + x.sequences).to(tl.int64) * x.row_size
    end = tl.cast(x.total, tl.int64) * x.row_size
    at += tl.program_id(0) * BLOCK
    while at < end:
        offsets = at + tl.arange(0, BLOCK)
        zeros = tl.zeros([BLOCK], x.pointer.dtype.element_ty)
        tl.store(x.pointer + offsets, zeros, mask=offsets < end)
        at += tl.num_programs(0) * BLOCK


def clear_tail(cu_seqlens: Tensor | None, x: Tensor) -> None:
    """Zero what lies after the last sequence of a packed tensor, without asking where that is."""
    assert cu_seqlens is not None
    launch(
        clear_tail_kernel,
        (64 if x.numel() else 0,),
        x.device,
        x=Packed(x, cu_seqlens.shape[0] - 1, x.shape[0], x.shape[1] * x.shape[2]),
        cu_seqlens=cu_seqlens,
        BLOCK=1024,
    )

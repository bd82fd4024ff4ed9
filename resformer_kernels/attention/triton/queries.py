"""The gradient of the queries on a GPU: one tile of rows a program, which passes over its keys."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.device import dot, round_to
from resformer_kernels._triton.launch import empty, launch
from resformer_kernels._triton.views import view_of
from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.attention.triton.forward import clear_tail
from resformer_kernels.attention.triton.loads import (
    RowNumbers,
    Source,
    load_keys,
    load_row_numbers,
    load_row_tile,
    row_slot,
    store_rows,
)
from resformer_kernels.attention.triton.problem import config_of, descriptor_of, shared
from resformer_kernels.attention.triton.rows import Incoming
from resformer_kernels.attention.triton.softmax import ADDITIVE, NO_BIAS, probabilities, scores
from resformer_kernels.attention.triton.tiles import (
    Limits,
    narrowed,
    phase_span,
    scheduled,
    seen_by_rows,
    spans_of_rows,
    tile_start,
    work_of,
)


@triton.jit
def queries_gradient_kernel(
    q,
    k,
    mixed,
    grad_out,
    base,
    delta,
    rest,
    slots,
    dq,
    work,
    k_descriptor,
    mixed_descriptor,
    scale,
    scoring,
    geometry,
    q_len,
    k_len,
    window_left,
    window_right,
    sizes,
):
    """dQ of one tile of rows; `mixed` is V'."""
    ROWS: tl.constexpr = sizes.ROWS
    KEYS: tl.constexpr = sizes.KEYS
    tile, at = scheduled(
        work,
        geometry,
        Limits(q_len, k_len, window_left, window_right),
        geometry.HAS_RIGHT and not geometry.HAS_LEFT,
    )
    first_row = tile * ROWS
    if first_row >= at.count:
        return
    # (ROWS, BLOCK_K), (ROWS, BLOCK_V)
    q_tile = load_row_tile(
        Source(q, None, geometry, sizes.DIM_K, sizes.BLOCK_K), at, first_row, ROWS, True
    )
    grad_tile = load_row_tile(
        Source(grad_out, None, geometry, sizes.DIM_V, sizes.BLOCK_V), at, first_row, ROWS, True
    )
    slot = row_slot(at, slots, geometry)
    row_base = load_row_numbers(RowNumbers(base, None, slot), first_row, ROWS)
    row_delta = load_row_numbers(RowNumbers(delta, None, slot), first_row, ROWS)
    row_rest = 0.0
    if scoring.BIAS == ADDITIVE:
        row_rest = load_row_numbers(RowNumbers(rest, None, slot), first_row, ROWS)
        row_rest = row_rest[:, None]
    rows, spans = spans_of_rows(tile, at, geometry, sizes)
    spans = narrowed(spans, work, tile, at, scoring.BIAS)
    seen = seen_by_rows(rows, at, scoring, geometry)
    # (ROWS, BLOCK_K)
    dq_tile = tl.zeros([ROWS, sizes.BLOCK_K], tl.float32)
    for phase in tl.static_range(
        2 if scoring.BIAS != NO_BIAS else 0 if geometry.HAS_LEFT else 1, 3
    ):
        start, stop = phase_span(spans, phase)
        for step in tl.range(start, stop):
            key = tile_start(step, work, tile, at, KEYS, scoring.BIAS)
            keys = key + tl.arange(0, KEYS)
            # (KEYS, BLOCK_K)
            k_tile = load_keys(
                Source(k, k_descriptor, geometry, sizes.DIM_K, sizes.BLOCK_K),
                at,
                key,
                KEYS,
                phase != 1,
            )
            # (ROWS, KEYS)
            product = dot(q_tile, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32))
            x, slope = scores(product, keys[None, :], seen, scoring, phase != 1)
            p = probabilities(x, row_base[:, None], row_rest, scoring)
            # (KEYS, BLOCK_V)
            v_tile = load_keys(
                Source(mixed, mixed_descriptor, geometry, sizes.DIM_V, sizes.BLOCK_V),
                at,
                key,
                KEYS,
                phase != 1,
            )
            dp = dot(grad_tile, tl.trans(v_tile), tl.zeros([ROWS, KEYS], tl.float32))
            ds = p * (dp - row_delta[:, None])
            if scoring.CAPPED:
                ds = ds * slope
            dq_tile = dot(round_to(ds, k_tile.dtype), k_tile, dq_tile)
    dq_tile = dq_tile * scale
    store_rows(dq_tile, Source(dq, None, geometry, sizes.DIM_K, sizes.BLOCK_K), at, rows)


def queries_gradient(call: AttentionCall, incoming: Incoming) -> Tensor:
    """The gradient of q."""
    config = config_of(call, "queries")
    work = work_of(call, config, by_rows=True)
    arguments = shared(call, config.rows, config.keys)
    block_k, block_v = (arguments["sizes"].BLOCK_K.value, arguments["sizes"].BLOCK_V.value)
    dq = empty(call.q, call.q.shape)
    if call.packed:
        clear_tail(call.cu_seqlens_q, dq)
    launch(
        queries_gradient_kernel,
        (call.sequences * call.kv_heads * work.tiles,),
        call.q.device,
        q=view_of(call.q),
        k=view_of(call.k),
        mixed=view_of(incoming.mixed),
        grad_out=view_of(incoming.grad_out),
        dq=view_of(dq),
        work=work,
        k_descriptor=descriptor_of(call.k, config.keys, block_k),
        mixed_descriptor=descriptor_of(incoming.mixed, config.keys, block_v),
        scale=call.scale,
        num_warps=config.warps,
        num_stages=config.stages,
        **incoming.row_numbers(),
        **arguments,
    )
    return dq

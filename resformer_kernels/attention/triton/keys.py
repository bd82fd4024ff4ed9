"""The gradients of keys and values on a GPU: a tile of keys a program, which passes over rows.

dV' is split into the gradients of v, v_first and the coefficients where it is complete; nothing is
added by atomics, so the same bits come out of every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resformer_kernels._triton.arch import has_tensor_descriptors
from resformer_kernels._triton.device import dot, round_to, widen
from resformer_kernels._triton.launch import capability, empty, launch
from resformer_kernels._triton.views import view_of
from resformer_kernels.attention.record import AttentionCall
from resformer_kernels.attention.triton.configs import Config
from resformer_kernels.attention.triton.forward import clear_tail
from resformer_kernels.attention.triton.loads import (
    RowNumbers,
    Source,
    load_factor,
    load_keys,
    load_row_numbers,
    load_row_tile,
    row_slot,
    store_keys,
)
from resformer_kernels.attention.triton.problem import config_of, descriptor_of, shared, values
from resformer_kernels.attention.triton.rows import Incoming
from resformer_kernels.attention.triton.softmax import ADDITIVE, NO_BIAS, probabilities, scores
from resformer_kernels.attention.triton.tiles import (
    Limits,
    narrowed,
    phase_span,
    row_tiles,
    scheduled,
    seen_by_columns,
    tile_start,
    work_of,
)

# How a coefficient's gradient leaves the kernel: as float32 sums of dV' * V in a fixed order, over
# the channels of each key, over the keys of each tile, or not summed at all.
NO_PARTIAL: tl.constexpr = tl.constexpr(0)
BY_KEY: tl.constexpr = tl.constexpr(1)
BY_COLUMN: tl.constexpr = tl.constexpr(2)
BY_ELEMENT: tl.constexpr = tl.constexpr(3)


class Partial(NamedTuple):
    """Partial sums of a coefficient's gradient."""

    pointer: Tensor | None
    KIND: tl.constexpr


class Gradient(NamedTuple):
    """One source of V' in a kernel: where its gradient goes, what it was mixed with. It holds
    constants: make it in the call that takes it."""

    out: Any
    value: Any
    factor: Any
    partial: Any
    MIXES: Any


@triton.jit
def _write_value_gradient(gradient, to, at, first_key, tile, k_total, KEYS: tl.constexpr):
    """factor * dV' to one source of V', and the partial sums of dV' * value for the factor."""
    if to.out.view.pointer is not None:
        own = gradient
        if to.MIXES:
            own = gradient * load_factor(to.factor, to.out, at, first_key, KEYS)
        store_keys(own, to.out, at, first_key, KEYS)
    if to.partial.KIND != NO_PARTIAL:
        WIDTH: tl.constexpr = to.value.WIDTH
        heads = to.value.geometry.heads
        keys = first_key + tl.arange(0, KEYS)
        columns = tl.arange(0, to.value.BLOCK)
        inside = (keys < at.k_len)[:, None] & (columns < WIDTH)[None, :]
        # (KEYS, BLOCK_V)
        terms = gradient * widen(load_keys(to.value, at, first_key, KEYS, True))
        row = (tl.cast(at.batch, tl.int64) * k_total + at.k_start + keys) * heads + at.head
        if to.partial.KIND == BY_KEY:
            tl.store(to.partial.pointer + row, tl.sum(terms, 1), mask=keys < at.k_len)
        elif to.partial.KIND == BY_COLUMN:
            # Gradients past the last key belong to no key at all.
            terms = tl.where(inside, terms, 0.0)
            cell = to.partial.pointer + (tl.cast(tile, tl.int64) * heads + at.head) * WIDTH
            tl.store(cell + columns, tl.sum(terms, 0), mask=columns < WIDTH)
        else:
            cells = to.partial.pointer + row[:, None] * WIDTH + columns[None, :]
            tl.store(cells, terms, mask=inside)


@triton.jit
def keys_gradient_kernel(
    q,
    k,
    mixed,
    values,
    grad_out,
    base,
    delta,
    rest,
    slots,
    dk,
    dv,
    dv_first,
    grad_mixed,
    own_partial,
    first_partial,
    work,
    q_descriptor,
    grad_descriptor,
    base_descriptor,
    delta_descriptor,
    rest_descriptor,
    dk_descriptor,
    dv_descriptor,
    first_descriptor,
    k_total,
    scale,
    scoring,
    geometry,
    q_len,
    k_len,
    window_left,
    window_right,
    sizes,
):
    """dK and dV' of one tile of keys, and what dV' is to v, v_first and the coefficients.

    `mixed` is V', `values` what it was mixed from.
    """
    ROWS: tl.constexpr = sizes.ROWS
    KEYS: tl.constexpr = sizes.KEYS
    DIM_V: tl.constexpr = sizes.DIM_V
    BLOCK_V: tl.constexpr = sizes.BLOCK_V
    limits = Limits(q_len, k_len, window_left, window_right)
    tile, at = scheduled(work, geometry, limits, False)
    first_key = tile * KEYS
    if first_key >= at.k_len:
        return
    slot = row_slot(at, slots, geometry)
    keys = first_key + tl.arange(0, KEYS)
    # By pointers: the compiler keeps the left operand of a product in shared memory only where it
    # is a plain load. A tile of registers here would spill.
    # (KEYS, BLOCK_K), (KEYS, BLOCK_V)
    k_tile = load_keys(
        Source(k, None, geometry, sizes.DIM_K, sizes.BLOCK_K), at, first_key, KEYS, True
    )
    v_tile = load_keys(Source(mixed, None, geometry, DIM_V, BLOCK_V), at, first_key, KEYS, True)
    last_key = tl.minimum(first_key + KEYS, at.k_len) - 1
    spans = row_tiles(first_key, last_key, at, geometry, ROWS)
    spans = narrowed(spans, work, tile, at, scoring.BIAS)
    dk_tile = tl.zeros([KEYS, sizes.BLOCK_K], tl.float32)
    dv_tile = tl.zeros([KEYS, BLOCK_V], tl.float32)
    for phase in tl.static_range(
        2 if scoring.BIAS != NO_BIAS else 0 if geometry.HAS_RIGHT else 1, 3
    ):
        start, stop = phase_span(spans, phase)
        for step in tl.range(start, stop):
            first_row = tile_start(step, work, tile, at, ROWS, scoring.BIAS)
            rows = first_row + tl.arange(0, ROWS)
            # (ROWS, BLOCK_K)
            q_tile = load_row_tile(
                Source(q, q_descriptor, geometry, sizes.DIM_K, sizes.BLOCK_K),
                at,
                first_row,
                ROWS,
                phase != 1,
            )
            # (KEYS, ROWS)
            if scoring.PRECISE:
                # Summed in forward's order: a row with one key must find P = exp(s - LSE) = 1.
                product = dot(q_tile, tl.trans(k_tile), tl.zeros([ROWS, KEYS], tl.float32))
                product = tl.trans(product)
            else:
                product = dot(k_tile, tl.trans(q_tile), tl.zeros([KEYS, ROWS], tl.float32))
            row_base = load_row_numbers(RowNumbers(base, base_descriptor, slot), first_row, ROWS)
            row_rest = 0.0
            if scoring.BIAS == ADDITIVE:
                row_rest = load_row_numbers(
                    RowNumbers(rest, rest_descriptor, slot), first_row, ROWS
                )[None, :]
            seen = seen_by_columns(rows, at, scoring, geometry)
            x, slope = scores(product, keys[:, None], seen, scoring, phase != 1)
            p = probabilities(x, row_base[None, :], row_rest, scoring)
            # (ROWS, BLOCK_V)
            grad_tile = load_row_tile(
                Source(grad_out, grad_descriptor, geometry, DIM_V, BLOCK_V),
                at,
                first_row,
                ROWS,
                phase != 1,
            )
            dv_tile = dot(round_to(p, grad_tile.dtype), grad_tile, dv_tile)
            # (KEYS, ROWS)
            dp = dot(v_tile, tl.trans(grad_tile), tl.zeros([KEYS, ROWS], tl.float32))
            row_delta = load_row_numbers(RowNumbers(delta, delta_descriptor, slot), first_row, ROWS)
            ds = p * (dp - row_delta[None, :])
            if scoring.CAPPED:
                ds = ds * slope
            dk_tile = dot(round_to(ds, q_tile.dtype), q_tile, dk_tile)

    # Plus 0, which the compiler does not know: else it would keep the addresses of these keys in
    # registers throughout the loops, and spill.
    first_key += tl.minimum(spans.end, 0)
    if dk.pointer is not None:
        dk_tile = dk_tile * scale
        store_keys(
            dk_tile,
            Source(dk, dk_descriptor, geometry, sizes.DIM_K, sizes.BLOCK_K),
            at,
            first_key,
            KEYS,
        )
    if grad_mixed.pointer is not None:
        dv_tile += widen(
            load_keys(Source(grad_mixed, None, geometry, DIM_V, BLOCK_V), at, first_key, KEYS, True)
        )
    cell = at.sequence * work.tiles + tile
    _write_value_gradient(
        dv_tile,
        Gradient(
            Source(dv, dv_descriptor, geometry, DIM_V, BLOCK_V),
            Source(values.v, None, geometry, DIM_V, BLOCK_V),
            values.own,
            own_partial,
            values.MIXES,
        ),
        at,
        first_key,
        cell,
        k_total,
        KEYS,
    )
    _write_value_gradient(
        dv_tile,
        Gradient(
            Source(dv_first, first_descriptor, geometry, DIM_V, BLOCK_V),
            Source(values.v_first, None, geometry, DIM_V, BLOCK_V),
            values.first,
            first_partial,
            values.MIXES,
        ),
        at,
        first_key,
        cell,
        k_total,
        KEYS,
    )


def keys_gradients(
    call: AttentionCall, incoming: Incoming, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of k, v, v_first, lambda_v and lambda_first, where wanted."""
    want_k, want_v, want_first, want_lambda_v, want_lambda_first = wanted
    config = config_of(call, "keys")
    work = work_of(call, config, by_rows=False)
    dk = _fresh(call, call.k) if want_k else None
    dv = _fresh(call, call.value) if want_v else None
    dv_first = _fresh(call, call.value) if want_first else None
    own = _Partial(call, call.lambda_v if want_lambda_v else None, work.tiles)
    first = _Partial(call, call.lambda_first if want_lambda_first else None, work.tiles)
    # Where nothing is mixed, the values that are there are `values.v`.
    written = (dk, dv if call.v is not None else dv_first, dv_first if call.mixes else None)
    arguments = shared(call, config.rows, config.keys)
    blocks = (arguments["sizes"].BLOCK_K.value, *(arguments["sizes"].BLOCK_V.value,) * 2)
    descriptors: list[TensorDescriptor | None] = [None] * 3
    if not call.packed:
        # In a packed tensor a descriptor would write past the sequence's end, into the next one.
        descriptors = [
            descriptor_of(x, config.keys, block) for x, block in zip(written, blocks, strict=True)
        ]
    launch(
        keys_gradient_kernel,
        (call.sequences * call.kv_heads * work.tiles,),
        call.q.device,
        q=view_of(call.q),
        k=view_of(call.k),
        mixed=view_of(incoming.mixed),
        values=values(call),
        grad_out=view_of(incoming.grad_out),
        dk=view_of(dk),
        dv=view_of(written[1]),
        dv_first=view_of(written[2]),
        grad_mixed=view_of(incoming.grad_mixed),
        own_partial=own.argument(),
        first_partial=first.argument(),
        work=work,
        dk_descriptor=descriptors[0],
        dv_descriptor=descriptors[1],
        first_descriptor=descriptors[2],
        k_total=call.k.shape[-3],
        scale=call.scale,
        num_warps=config.warps,
        num_stages=config.stages,
        **incoming.row_numbers(),
        **_row_descriptors(call, incoming, config, blocks),
        **arguments,
    )
    return [dk, dv, dv_first, own.reduced(), first.reduced()]


def _fresh(call: AttentionCall, leaf: Tensor) -> Tensor:
    """A gradient of the leaf's shape; what lies after the last sequence is zero."""
    gradient = empty(leaf, leaf.shape)
    if call.packed:
        clear_tail(call.cu_seqlens_k, gradient)
    return gradient


def _row_descriptors(
    call: AttentionCall, incoming: Incoming, config: Config, blocks: tuple[int, ...]
) -> dict[str, TensorDescriptor | None]:
    """Descriptors of what is read by tiles of rows: q and dO where tiles hold whole queries, and
    the numbers of rows."""
    rows = ("base_descriptor", "delta_descriptor", "rest_descriptor")
    names = ("q_descriptor", "grad_descriptor", *rows)
    if not has_tensor_descriptors(capability(call.q.device)) or call.q.numel() == 0:
        return dict.fromkeys(names)
    whole = config.rows % call.group == 0
    found = [
        descriptor_of(x, config.rows // call.group, block, call.group) if whole else None
        for x, block in ((call.q, blocks[0]), (incoming.grad_out, blocks[1]))
    ]
    for x in (incoming.base, incoming.delta, incoming.rest):
        found.append(x if x is None else TensorDescriptor(x, [x.numel()], [1], [config.rows]))
    return dict(zip(names, found, strict=True))


class _Partial:
    """The gradient of a coefficient: what the kernel fills, and how the rest is summed away."""

    def __init__(self, call: AttentionCall, c: Tensor | None, tiles: int) -> None:
        self.kind, self.c = NO_PARTIAL, c
        self.sums: Tensor | None = None
        if c is None:
            return
        shape = list(call.value.shape)
        if c.shape[-1] == 1:
            self.kind = BY_KEY
            shape[-1] = 1
        elif c.shape[-3] == 1:
            self.kind = BY_COLUMN
            shape[-3] = call.sequences * tiles if call.packed else tiles
        else:
            self.kind = BY_ELEMENT
        # Some packed keys belong to no sequence, and some tiles to none.
        make = torch.Tensor.new_zeros if call.packed else empty
        self.sums = make(call.value, shape, dtype=torch.float32)

    def argument(self) -> Partial:
        """What the kernel is given."""
        return Partial(self.sums, self.kind)

    def reduced(self) -> Tensor | None:
        """The gradient, once the kernel has run."""
        if self.sums is None or self.c is None:
            return None
        return summed_to(self.sums, self.c)


def summed_to(sums: Tensor, leaf: Tensor) -> Tensor:
    """Sums over the axes along which `leaf` broadcasts, in float64, in the leaf's dtype."""
    axes = [
        axis
        for axis, (size, found) in enumerate(zip(leaf.shape, sums.shape, strict=True))
        if size == 1 and found != 1
    ]
    if axes:
        sums = sums.sum(axes, keepdim=True, dtype=torch.float64)
    return sums.to(leaf.dtype)

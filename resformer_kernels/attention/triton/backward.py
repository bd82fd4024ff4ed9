"""The backward op on Triton: its kernels in order, and the sums that torch finishes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resformer_kernels._core.old import unit_stride
from resformer_kernels._triton.arch import has_tensor_descriptors
from resformer_kernels._triton.launch import capability, empty, launch
from resformer_kernels._triton.views import NOTHING, view_of
from resformer_kernels.attention.triton import bias as bias_kernels
from resformer_kernels.attention.triton import configs, loads
from resformer_kernels.attention.triton import keys as kernels
from resformer_kernels.attention.triton import queries as queries_kernels
from resformer_kernels.attention.triton.launch import clear_tail, open_tiles, premix, section
from resformer_kernels.attention.triton.problem import Problem, descriptor_of, lse_view

# Of a problem's masks, what says where a sequence lies.
_PLACES = ("cu_q", "cu_k", "q_len", "k_len", "heads", "GROUP", "PACKED")

Q, K, V, V_FIRST, LAMBDA_V, LAMBDA_FIRST, SINKS, BIAS = range(8)


@dataclass
class Incoming:
    """The gradients of the outputs, and what is known of each row: see `rows_kernel`."""

    grad_out: Tensor
    grad_lse: Tensor | None
    grad_mixed: Tensor | None
    base: Tensor
    delta: Tensor
    mixed: Tensor
    """V', mixed again."""


def backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The implementation of the backward op: its arguments, in the schema's order."""
    grad_out, grad_lse, grad_mixed, *shared, out, lse, mask = arguments
    p = Problem(*shared)
    leaves = (p.q, p.k, p.v, p.v_first, p.lambda_v, p.lambda_first, p.sinks, p.attn_bias)
    wanted = [leaf is not None and bool(mask >> bit & 1) for bit, leaf in enumerate(leaves)]
    slots = p.heads * _slots(p)
    incoming = Incoming(
        unit_stride(grad_out),
        grad_lse if grad_lse is not None and grad_lse.numel() else None,
        unit_stride(grad_mixed) if grad_mixed is not None and grad_mixed.numel() else None,
        empty(p.q, (slots,), torch.float32),
        empty(p.q, (slots,), torch.float32),
        premix(p) if p.mixes else p.value,
    )
    found: list[Tensor | None] = [None] * len(leaves)
    found[SINKS] = _reduce_rows(p, incoming, out, lse, wanted[SINKS])
    if any(wanted[K : LAMBDA_FIRST + 1]):
        found[K : LAMBDA_FIRST + 1] = _keys(p, incoming, wanted)
    if wanted[Q]:
        found[Q] = _queries(p, incoming)
    if wanted[BIAS] and p.attn_bias is not None and p.attn_bias.dtype is not torch.bool:
        found[BIAS] = _bias(p, incoming, p.attn_bias)
    return tuple(
        gradient if gradient is not None else _nothing(p, bit, leaf)
        for bit, (gradient, leaf) in enumerate(zip(found, leaves, strict=True))
    )


def _slots(p: Problem) -> int:
    """How many numbers of rows a KV head has: see `triton_loads.row_slot`."""
    queries = p.q.shape[0] * (1 if p.packed else p.q.shape[1])
    size = loads.ROW_SLOT.value
    return (-(-queries * p.group // size) + p.sequences + 1) * size


def _nothing(p: Problem, bit: int, leaf: Tensor | None) -> Tensor:
    """What stands for a gradient that was not asked for, of the dtype that the fake says."""
    if leaf is not None:
        return leaf.new_empty((0,))
    return p.q.new_empty((0,), dtype=p.q.dtype if bit <= V_FIRST else torch.float32)


def _reduce_rows(
    p: Problem, incoming: Incoming, out: Tensor, lse: Tensor, want_sinks: bool
) -> Tensor | None:
    """Fill `incoming`'s rows; return the sinks' gradient."""
    dims = p.dims()
    size = max(16, 4096 // dims["BLOCK_V"])
    count = -(-p.rows // size)
    heads_first = (*lse.shape,)
    sink_rows = p.q.new_zeros(heads_first, dtype=torch.float32) if want_sinks else None
    masks = p.masks()
    launch(
        kernels.rows_kernel,
        (p.sequences * p.heads * count,),
        p.q.device,
        grad_out=view_of(incoming.grad_out),
        out=view_of(out),
        lse=lse_view(lse),
        grad_lse=NOTHING if incoming.grad_lse is None else lse_view(incoming.grad_lse),
        sinks=p.sinks,
        base=incoming.base,
        delta=incoming.delta,
        sink_rows=NOTHING if sink_rows is None else lse_view(sink_rows),
        slots=_slots(p),
        tiles=count,
        DIM_V=dims["DIM_V"],
        BLOCK_V=dims["BLOCK_V"],
        ROWS=size,
        PRECISE=p.precise,
        num_warps=4,
        **{name: masks[name] for name in _PLACES},
    )
    if sink_rows is None or p.sinks is None:
        return None
    over = (1,) if p.packed else (0, 2)
    return sink_rows.sum(over, dtype=torch.float64).to(p.sinks.dtype)


def _fresh(p: Problem, leaf: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A gradient of the leaf's shape; what lies after the last sequence is zero."""
    gradient = empty(leaf, leaf.shape)
    if p.packed:
        clear_tail(cu_seqlens, gradient)
    return gradient


class _Partial:
    """The gradient of a coefficient: what the kernel fills, and how the rest is summed away."""

    def __init__(self, p: Problem, c: Tensor | None, tiles: int) -> None:
        self.kind = kernels.NO_PARTIAL.value
        self.sums: Tensor | None = None
        self.c = c
        if c is None:
            return
        shape = list(p.value.shape)
        if c.shape[-1] == 1:
            self.kind = kernels.BY_KEY.value
            shape[-1] = 1
        elif c.shape[-3] == 1:
            self.kind = kernels.BY_COLUMN.value
            shape[-3] = p.sequences * tiles if p.packed else tiles
        else:
            self.kind = kernels.BY_ELEMENT.value
        # Of packed keys, some belong to no sequence, and some tiles to none.
        make = torch.Tensor.new_zeros if p.packed else empty
        self.sums = make(p.value, shape, dtype=torch.float32)

    def reduced(self) -> Tensor | None:
        if self.sums is None or self.c is None:
            return None
        sums = self.sums
        axes = [
            axis
            for axis, (size, found) in enumerate(zip(self.c.shape, sums.shape, strict=True))
            if size == 1 and found != 1
        ]
        if axes:
            sums = sums.sum(axes, keepdim=True, dtype=torch.float64)
        return sums.to(self.c.dtype)


def _row_descriptors(
    p: Problem, incoming: Incoming, config: configs.Config
) -> dict[str, TensorDescriptor | None]:
    """Of what is read by tiles of rows: q and dO (where tiles hold whole queries), base, delta."""
    names = ("q_descriptor", "grad_descriptor", "base_descriptor", "delta_descriptor")
    if not has_tensor_descriptors(capability(p.q.device)) or p.q.numel() == 0:
        return dict.fromkeys(names)
    dims = p.dims()
    whole = config.rows % p.group == 0
    found = [
        descriptor_of(x, config.rows // p.group, dims[block], p.group) if whole else None
        for x, block in ((p.q, "BLOCK_K"), (incoming.grad_out, "BLOCK_V"))
    ]
    numbers = (incoming.base, incoming.delta)
    found += [TensorDescriptor(x, [x.numel()], [1], [config.rows]) for x in numbers]
    return dict(zip(names, found, strict=True))


def _key_descriptors(
    p: Problem, config: configs.Config, **tensors: tuple[Tensor | None, str]
) -> dict[str, TensorDescriptor | None]:
    """Of tensors by tiles of keys, each with the name of its block's width."""
    if not has_tensor_descriptors(capability(p.q.device)):
        return dict.fromkeys(tensors)
    dims = p.dims()
    return {
        name: descriptor_of(x, config.keys, dims[block]) for name, (x, block) in tensors.items()
    }


def _keys(p: Problem, incoming: Incoming, wanted: list[bool]) -> list[Tensor | None]:
    """The gradients of k, v, v_first, lambda_v and lambda_first."""
    dims = p.dims()
    widest = max(dims["BLOCK_K"], dims["BLOCK_V"])
    arch = capability(p.q.device)
    config = configs.choose(arch, "keys", p.q.dtype, widest, p.mask_kind)
    count = -(-p.max_k // config.keys)
    dk = _fresh(p, p.k, p.cu_k) if wanted[K] else None
    dv = _fresh(p, p.value, p.cu_k) if wanted[V] else None
    dv_first = _fresh(p, p.value, p.cu_k) if wanted[V_FIRST] else None
    own = _Partial(p, p.lambda_v if wanted[LAMBDA_V] else None, count)
    first = _Partial(p, p.lambda_first if wanted[LAMBDA_FIRST] else None, count)
    values, how = p.values()
    # Where nothing is mixed, the values that are there are `values.v`.
    source = dv if p.v is not None else dv_first
    listed, list_size = open_tiles(p, config, by_rows=False)
    # A descriptor would write past a packed sequence's end, into the next one.
    written = (None, None, None) if p.packed else (dk, source, dv_first if p.mixes else None)
    descriptors = {
        **_row_descriptors(p, incoming, config),
        **_key_descriptors(
            p,
            config,
            dk_descriptor=(written[0], "BLOCK_K"),
            dv_descriptor=(written[1], "BLOCK_V"),
            first_descriptor=(written[2], "BLOCK_V"),
        ),
    }
    launch(
        kernels.keys_gradient_kernel,
        (p.sequences * p.heads * count,),
        p.q.device,
        q=view_of(p.q),
        k=view_of(p.k),
        mixed=view_of(incoming.mixed),
        values=values,
        grad_out=view_of(incoming.grad_out),
        base=incoming.base,
        delta=incoming.delta,
        listed=listed,
        dk=view_of(dk),
        dv=view_of(source),
        dv_first=view_of(dv_first if p.mixes else None),
        grad_mixed=view_of(incoming.grad_mixed),
        own_partial=own.sums,
        first_partial=first.sums,
        slots=_slots(p),
        k_total=p.k.shape[-3],
        sequences=p.sequences,
        tiles=count,
        list_size=list_size,
        section=section(p, p.rows),
        scale=p.scale,
        ROWS=config.rows,
        KEYS=config.keys,
        **descriptors,
        OWN_PARTIAL=own.kind,
        FIRST_PARTIAL=first.kind,
        num_warps=config.warps,
        num_stages=config.stages,
        **p.masks(),
        **p.scores(),
        **dims,
        **how,
    )
    return [dk, dv, dv_first, own.reduced(), first.reduced()]


def _queries(p: Problem, incoming: Incoming) -> Tensor:
    """The gradient of q."""
    dims = p.dims()
    widest = max(dims["BLOCK_K"], dims["BLOCK_V"])
    arch = capability(p.q.device)
    config = configs.choose(arch, "queries", p.q.dtype, widest, p.mask_kind)
    descriptors = _key_descriptors(
        p,
        config,
        k_descriptor=(p.k, "BLOCK_K"),
        mixed_descriptor=(incoming.mixed, "BLOCK_V"),
    )
    dq = _fresh(p, p.q, p.cu_q)
    count = -(-p.rows // config.rows)
    listed, list_size = open_tiles(p, config, by_rows=True)
    launch(
        queries_kernels.queries_gradient_kernel,
        (p.sequences * p.heads * count,),
        p.q.device,
        q=view_of(p.q),
        k=view_of(p.k),
        mixed=view_of(incoming.mixed),
        grad_out=view_of(incoming.grad_out),
        base=incoming.base,
        delta=incoming.delta,
        listed=listed,
        dq=view_of(dq),
        **descriptors,
        slots=_slots(p),
        sequences=p.sequences,
        tiles=count,
        list_size=list_size,
        section=section(p, p.max_k),
        scale=p.scale,
        ROWS=config.rows,
        KEYS=config.keys,
        num_warps=config.warps,
        num_stages=config.stages,
        **p.masks(),
        **p.scores(),
        **dims,
    )
    return dq


def _bias(p: Problem, incoming: Incoming, bias: Tensor) -> Tensor:
    """The gradient of an additive attn_bias, (batch or 1, heads or 1, queries or 1, keys or 1)."""
    dims = p.dims()
    widest = max(dims["BLOCK_K"], dims["BLOCK_V"])
    config = configs.choose(capability(p.q.device), "bias", p.q.dtype, widest, "full")
    heads_q = p.q.shape[-2]
    q_tiles, k_tiles = -(-p.max_q // config.rows), -(-p.max_k // config.keys)
    inner = (1, 1)
    outer = (p.sequences, heads_q)
    if bias.shape[3] == 1:
        over, shape = bias_kernels.OVER_KEYS, (*outer, p.max_q, 1)
        k_tiles = 1
    elif bias.shape[2] == 1:
        over, shape = bias_kernels.OVER_QUERIES, (*outer, 1, p.max_k)
        q_tiles = 1
    else:
        over = bias_kernels.OVER_HEADS
        inner = (
            p.sequences if bias.shape[0] == 1 else 1,
            heads_q if bias.shape[1] == 1 else 1,
        )
        outer = (bias.shape[0], bias.shape[1])
        shape = (*outer, p.max_q, p.max_k)
    sums = empty(p.q, shape, torch.float32)
    scores, masks = p.scores(), p.masks()
    del scores["RAW"], masks["heads"]
    launch(
        bias_kernels.bias_gradient_kernel,
        (outer[0] * outer[1] * q_tiles * k_tiles,),
        p.q.device,
        q=view_of(p.q),
        k=view_of(p.k),
        mixed=view_of(incoming.mixed),
        grad_out=view_of(incoming.grad_out),
        base=incoming.base,
        delta=incoming.delta,
        dbias=sums,
        slots=_slots(p),
        outer_heads=outer[1],
        inner_sequences=inner[0],
        inner_heads=inner[1],
        q_tiles=q_tiles,
        k_tiles=k_tiles,
        ROWS=config.rows,
        KEYS=config.keys,
        OVER=over.value,
        num_warps=config.warps,
        num_stages=config.stages,
        **masks,
        **scores,
        **dims,
    )
    axes = [
        axis
        for axis, (size, found) in enumerate(zip(bias.shape, shape, strict=True))
        if size == 1 and found != 1
    ]
    if axes:
        sums = sums.sum(axes, keepdim=True, dtype=torch.float64)
    return sums.to(bias.dtype)

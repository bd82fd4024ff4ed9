"""The attention ops on Triton: outputs and scratch, configurations, grids and launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resformer_kernels._triton.arch import has_tensor_descriptors
from resformer_kernels._triton.launch import capability, empty, launch
from resformer_kernels._triton.views import NOTHING, view_of
from resformer_kernels.attention.triton import configs, tiles
from resformer_kernels.attention.triton import forward as kernels
from resformer_kernels.attention.triton.problem import Problem, descriptor_of, lse_view, padded

# Of the second-level cache, what a causal launch's keys and values may fill.
_CACHE_BYTES = 16 * 2**20


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The implementation of the forward op: its arguments, in the schema's order."""
    *shared, return_lse, return_mixed = arguments
    p = Problem(*shared)
    q, value = p.q, p.value
    out = empty(q, (*q.shape[:-1], value.shape[-1]))
    lse = _lse(p) if return_lse else q.new_empty((0,), dtype=torch.float32)
    arch = capability(q.device)
    inline = configs.mixes_inline(arch, padded(value.shape[-1]), p.rows)
    mixed = None
    if p.mixes and (return_mixed or not inline):
        mixed = premix(p)
    _launch_forward(p, arch, out, lse if return_lse else None, mixed)
    if p.packed:
        clear_tail(p.cu_q, out)
    if not return_mixed:
        mixed = value.new_empty((0,))
    elif mixed is None:
        mixed = _returned(p)
    return out, lse, mixed


def _lse(p: Problem) -> Tensor:
    """Packed rows that belong to no sequence see nothing: -inf."""
    heads, time = p.q.shape[-2], p.q.shape[-3]
    if p.packed:
        return p.q.new_full((heads, time), -torch.inf, dtype=torch.float32)
    return empty(p.q, (p.q.shape[0], heads, time), torch.float32)


def _returned(p: Problem) -> Tensor:
    """The mixed value to return where nothing is mixed: a copy, zero after the last sequence."""
    copy = p.value.clone(memory_format=torch.contiguous_format)
    if p.packed:
        clear_tail(p.cu_k, copy)
    return copy


def premix(p: Problem) -> Tensor:
    """V', mixed by a kernel of its own."""
    value = p.value
    mixed = empty(value, value.shape)
    values, how = p.values()
    batch, time = (1, value.shape[0]) if p.packed else (value.shape[0], value.shape[1])
    dim = value.shape[-1]
    block = padded(dim)
    keys = max(16, 4096 // block)
    del how["MIXES"]
    launch(
        kernels.mix_kernel,
        (batch * p.heads * -(-time // keys),),
        value.device,
        values=values,
        out=view_of(mixed),
        cu_k=p.cu_k,
        k_len=time,
        heads=p.heads,
        sequences=p.sequences,
        DIM=dim,
        BLOCK_DIM=block,
        KEYS=keys,
        PACKED=p.packed,
        num_warps=4,
        **how,
    )
    return mixed


def clear_tail(cu_seqlens: Tensor | None, x: Tensor) -> None:
    """Zero what lies after the last sequence of a packed tensor, without asking where that is."""
    assert cu_seqlens is not None
    launch(
        kernels.clear_tail_kernel,
        (64 if x.numel() else 0,),
        x.device,
        x=x,
        cu_seqlens=cu_seqlens,
        sequences=cu_seqlens.shape[0] - 1,
        total=x.shape[0],
        row_size=x.shape[1] * x.shape[2],
        BLOCK=1024,
    )


def open_tiles(p: Problem, config: configs.Config, by_rows: bool) -> tuple[Tensor | None, int]:
    """(the tiles that a boolean mask leaves open, ints a list), or (None, 0) without one."""
    if p.attn_bias is None or p.attn_bias.dtype is not torch.bool:
        return None, 0
    across, along = -(-p.rows // config.rows), -(-p.max_k // config.keys)
    if not by_rows:
        across, along = along, across
    listed = p.q.new_empty((p.sequences, p.heads, across, 1 + along), dtype=torch.int32)
    how = p.scores()
    launch(
        tiles.open_tiles_kernel,
        (p.sequences * p.heads * across,),
        p.q.device,
        bias=how["bias"],
        listed=listed,
        outer_tiles=across,
        list_size=1 + along,
        ROWS=config.rows,
        KEYS=config.keys,
        INDEX=how["INDEX"],
        BY_ROWS=by_rows,
        num_warps=4,
        **p.masks(),
    )
    return listed, 1 + along


def section(p: Problem, length: int) -> int:
    """How many KV heads' tiles are scheduled together: under a causal mask what the cache holds.

    `length`: of what a head's programs all read, keys and values or the rows of q and dO.
    """
    if p.window_right < 0 or p.window_left >= 0:
        return 1
    width = p.k.shape[-1] + p.value.shape[-1]
    return max(1, _CACHE_BYTES // max(1, length * width * p.k.element_size()))


def _launch_forward(
    p: Problem, arch: tuple[int, int], out: Tensor, lse: Tensor | None, mixed: Tensor | None
) -> None:
    dims = p.dims()
    widest = max(dims["BLOCK_K"], dims["BLOCK_V"])
    values, how = p.values(mixed)
    direction = "forward_inline" if how["MIXES"] else "forward"
    config = configs.choose(arch, direction, p.q.dtype, widest, p.mask_kind)
    descriptors: list[Any] = [None, None, None]
    if has_tensor_descriptors(arch):
        descriptors = [
            descriptor_of(p.k, config.keys, dims["BLOCK_K"]),
            descriptor_of(values.v.pointer, config.keys, dims["BLOCK_V"]),
            descriptor_of(values.v_first.pointer, config.keys, dims["BLOCK_V"]),
        ]
    listed, list_size = open_tiles(p, config, by_rows=True)
    row_tiles = -(-p.rows // config.rows)
    launch(
        kernels.forward_kernel,
        (p.sequences * p.heads * row_tiles,),
        p.q.device,
        q=view_of(p.q),
        k=view_of(p.k),
        values=values,
        out=view_of(out),
        lse=NOTHING if lse is None else lse_view(lse),
        sinks=p.sinks,
        open_tiles=listed,
        k_descriptor=descriptors[0],
        v_descriptor=descriptors[1],
        first_descriptor=descriptors[2],
        sequences=p.sequences,
        row_tiles=row_tiles,
        list_size=list_size,
        section=section(p, p.max_k),
        ROWS=config.rows,
        KEYS=config.keys,
        num_warps=config.warps,
        num_stages=config.stages,
        **p.masks(),
        **p.scores(),
        **dims,
        **how,
    )

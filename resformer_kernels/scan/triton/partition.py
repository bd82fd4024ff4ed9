"""The scan on Triton: outputs and scratch, grids and launches.

Where channels and tracks alone keep a GPU busy, a program takes all steps of its channels. Else
time is cut into chunks: one kernel finds what each chunk does to a state (a product and a sum), one
runs through the chunks with that, and one scans every chunk from the state that enters it. The cut
depends on shapes alone, and nothing is added up by whoever comes first: the same bits every time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._triton import device as lib
from resformer_kernels.scan.op import WANTS_GATES, WANTS_INITIAL, WANTS_TOKENS, state_dtype
from resformer_kernels.scan.triton import kernels
from resformer_kernels.scan.triton.carry import carry_kernel

PROGRAMS = 2048
"""Of one warp each: what keeps any GPU busy."""
LEAST_CHUNK = 256
"""Steps."""
STEPS = 8
"""That are loaded before the first of them is worked on; fewer of complex numbers, whose parts
take twice the registers."""
CHANNELS = 128
"""Of a program."""


class View(NamedTuple):
    """(track, time, channels) by strides in elements, those of a complex number being two."""

    pointer: Tensor | None
    track: int
    time: int


class Packing(NamedTuple):
    """Of each packed row: what it is to its sequence, and which that is."""

    kinds: Tensor | None
    owners: Tensor | None


class Cut(NamedTuple):
    """How the work of a call is shared out."""

    tracks: int
    time: int
    width: int
    """Channels."""
    block: int
    column_tiles: int
    chunk: int
    chunks: int
    steps: int
    """Loaded at once."""

    @property
    def programs(self) -> int:
        """One for each tile of channels of each chunk of each track."""
        return self.tracks * self.chunks * self.column_tiles

    def arguments(self) -> dict[str, int]:
        """Those that every kernel over steps takes."""
        return {
            "time": self.time,
            "width": self.width,
            "chunk": self.chunk,
            "chunks": self.chunks,
            "column_tiles": self.column_tiles,
            "STEPS": self.steps,
            "BLOCK": self.block,
            "num_warps": 1,
        }


_NO_VIEW = View(None, 0, 0)


def _parts(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def _flat(x: Tensor | None) -> Tensor | None:
    """A state as its kernels see it: contiguous, complex numbers as pairs."""
    return None if x is None else _parts(x.contiguous())


def _view(x: Tensor) -> View:
    parts = 2 if x.is_complex() else 1
    pointer = _parts(x)
    if x.dim() == 1:
        return View(pointer, 0, 0)
    return View(pointer, parts * x.stride(0) if x.dim() == 3 else 0, parts * x.stride(-2))


def cut(like: Tensor) -> Cut:
    """The cut for tokens like these."""
    tracks, time, width = like.shape if like.dim() == 3 else (1, *like.shape)
    most = CHANNELS // 2 if like.is_complex() else CHANNELS
    block = min(most, 1 << (max(1, width) - 1).bit_length())
    column_tiles = -(-width // block)
    abreast = max(1, tracks * column_tiles)
    chunks = 1
    if 2 * abreast <= PROGRAMS:
        chunks = max(1, min(-(-PROGRAMS // abreast), time // LEAST_CHUNK))
    chunk = -(-max(1, time) // chunks)
    steps = STEPS
    if like.is_complex():
        steps //= 2 if like.dim() == 3 else 4
    chunk = -(-chunk // steps) * steps
    return Cut(tracks, time, width, block, column_tiles, chunk, max(1, -(-time // chunk)), steps)


def _packing(cu_seqlens: Tensor | None, total: int) -> Packing:
    if cu_seqlens is None:
        return Packing(None, None)
    rows = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:].contiguous()
    owners = torch.searchsorted(ends, rows, right=True).clamp(max=ends.shape[0] - 1)
    inside = rows < ends[-1]
    kinds = (
        kernels.INSIDE.value
        + kernels.FIRST.value * (rows == starts[owners])
        + kernels.LAST.value * (rows == ends[owners] - 1)
    )
    return Packing((kinds * inside).to(torch.int32), owners.to(torch.int32))


def _entering(
    how: Cut,
    gates: Tensor,
    tokens: Tensor | None,
    entered: Tensor | None,
    packing: Packing,
    flags: dict[str, Any],
    *,
    backward: bool,
) -> Tensor | None:
    """The state that enters each chunk; None where there is only one."""
    if how.chunks == 1:
        return None
    shape = (how.tracks * how.chunks, how.width * (2 if flags["COMPLEX"] else 1))
    products, ends, entering = (lib.empty(gates, shape, torch.float32) for _ in range(3))
    resets = gates.new_empty(shape[:1], dtype=torch.int32) if flags["PACKED"] else None
    lib.launch(
        kernels.summary_kernel,
        (how.programs,),
        gates.device,
        gates=_view(gates),
        tokens=_NO_VIEW if tokens is None else _view(tokens),
        entered=entered,
        products=products,
        ends=ends,
        resets=resets,
        packing=packing,
        TOKENS=tokens is not None,
        BACKWARD=backward,
        **how.arguments(),
        **flags,
    )
    lib.launch(
        carry_kernel,
        (how.tracks * how.column_tiles,),
        gates.device,
        products=products,
        ends=ends,
        resets=resets,
        entered=entered,
        entering=entering,
        width=how.width,
        chunks=how.chunks,
        column_tiles=how.column_tiles,
        COMPLEX=flags["COMPLEX"],
        PACKED=flags["PACKED"],
        STEPS=how.steps,
        BLOCK=how.block,
        num_warps=1,
    )
    return entering


def _flags(
    gates: Tensor, like: Tensor, cu_seqlens: Tensor | None, reversed_: bool
) -> dict[str, Any]:
    return {
        "COMPLEX": like.is_complex(),
        "CONSTANT": gates.dim() == 1,
        "PACKED": cu_seqlens is not None,
        "REVERSED": reversed_,
    }


def forward(
    gates: Tensor,
    tokens: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The implementation of the op: its arguments, in the schema's order."""
    sequences = tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = lib.empty(tokens, tokens.shape)
    final = lib.empty(tokens, (sequences, tokens.shape[-1]), state_dtype(tokens.dtype))
    if cu_seqlens is not None or tokens.shape[-2] == 0:
        # An empty sequence is not visited.
        final.zero_() if initial_state is None else final.copy_(initial_state)
    if states.numel() == 0 or sequences == 0:
        return states.zero_(), final
    how, flags = cut(tokens), _flags(gates, tokens, cu_seqlens, reverse)
    packing, initial = _packing(cu_seqlens, how.time), _flat(initial_state)
    entering = _entering(how, gates, tokens, initial, packing, flags, backward=False)
    lib.launch(
        kernels.forward_kernel,
        (how.programs,),
        tokens.device,
        gates=_view(gates),
        tokens=_view(tokens),
        states=_view(states),
        entering=entering,
        initial=initial,
        final=_parts(final),
        packing=packing,
        **how.arguments(),
        **flags,
    )
    return states, final


def backward(
    grad_states: Tensor | None,
    grad_final: Tensor | None,
    gates: Tensor,
    states: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    grad_mask: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The implementation of the op: its arguments, in the schema's order."""
    sequences = states.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d_tokens = lib.empty(states, states.shape if grad_mask & WANTS_TOKENS else (0,))
    d_gates = lib.empty(gates, gates.shape if grad_mask & WANTS_GATES else (0,))
    d_initial = states.new_empty((0,))
    if grad_mask & WANTS_INITIAL:
        assert initial_state is not None
        d_initial = lib.empty(initial_state, initial_state.shape)
        if cu_seqlens is not None or states.shape[-2] == 0:
            d_initial.zero_() if grad_final is None else d_initial.copy_(grad_final)
    if states.numel() == 0 or sequences == 0:
        return d_tokens.zero_(), d_gates.zero_(), d_initial
    how, flags = cut(states), _flags(gates, states, cu_seqlens, not reverse)
    packing, d_final = _packing(cu_seqlens, how.time), _flat(grad_final)
    entering = _entering(how, gates, grad_states, d_final, packing, flags, backward=True)
    wants_gates = bool(grad_mask & WANTS_GATES)
    sums = None
    if wants_gates and flags["CONSTANT"]:
        parts = 2 if flags["COMPLEX"] else 1
        rows = how.tracks * how.chunks
        sums = lib.empty(gates, (rows, how.width * parts), torch.float64)
    lib.launch(
        kernels.backward_kernel,
        (how.programs,),
        states.device,
        grad=_NO_VIEW if grad_states is None else _view(grad_states),
        gates=_view(gates),
        states=_view(states),
        d_tokens=_view(d_tokens) if grad_mask & WANTS_TOKENS else _NO_VIEW,
        d_gates=_view(d_gates) if wants_gates and sums is None else _NO_VIEW,
        sums=sums,
        entering=entering,
        d_final=d_final,
        initial=_flat(initial_state),
        d_initial=_parts(d_initial) if grad_mask & WANTS_INITIAL else None,
        packing=packing,
        GRAD=grad_states is not None,
        WANTS_GATES=wants_gates,
        **how.arguments(),
        **flags,
    )
    if sums is not None:
        _parts(d_gates).copy_(sums.sum(0).view(_parts(d_gates).shape))
    return d_tokens, d_gates, d_initial

"""The split of a scan over programs, and its tensors as the kernels take them.

Where channels and tracks alone occupy a GPU, a program takes all steps of its channels. Otherwise
time is split into chunks: one kernel finds what each chunk does to a state (a product and a sum),
one runs through the chunks with that, and one scans every chunk from the state that enters it. The
split depends on shapes alone, and nothing is added atomically: the same bits every time.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.launch import empty
from resformer_kernels.scan.triton.steps import FIRST, INSIDE, LAST, Packing, View, Work

PROGRAMS = 2048
"""Programs of one warp that occupy any GPU."""
LEAST_CHUNK = 256
"""Steps of the shortest chunk."""
STEPS = 8
"""Steps loaded before the first is processed; half of that for complex numbers, whose parts take
twice the registers, and a quarter for packed ones."""
CHANNELS = 128
"""Most channels of a program; half of that for complex numbers."""


def check_constants() -> None:
    """AssertionError where a constant has a value that kernels cannot be compiled for."""
    assert PROGRAMS >= 1
    assert LEAST_CHUNK >= 1
    assert STEPS >= 4, "complex packed tokens are loaded a quarter as many steps at once"
    assert CHANNELS >= 2
    assert CHANNELS & (CHANNELS - 1) == 0, "tiles have powers of two"


NO_VIEW = View(None, 0, 0)


def partition(like: Tensor, cu_seqlens: Tensor | None, *, reverse: bool) -> tuple[int, Work]:
    """(number of programs, their argument) for tokens like these."""
    tracks, time, width = like.shape if like.dim() == 3 else (1, *like.shape)
    most = CHANNELS // 2 if like.is_complex() else CHANNELS
    block = min(most, 1 << (max(1, width) - 1).bit_length())
    column_tiles = -(-width // block)
    without_chunks = max(1, tracks * column_tiles)
    chunks = 1
    if 2 * without_chunks <= PROGRAMS:
        chunks = max(1, min(-(-PROGRAMS // without_chunks), time // LEAST_CHUNK))
    steps = STEPS
    if like.is_complex():
        steps = max(1, STEPS // (2 if like.dim() == 3 else 4))
    chunk = -(-max(1, time) // chunks)
    chunk = -(-chunk // steps) * steps
    chunks = max(1, -(-time // chunk))
    constants = (tl.constexpr(x) for x in (like.is_complex(), reverse, steps, block))
    packing = _packing(cu_seqlens, time)
    work = Work(packing, time, width, chunk, chunks, column_tiles, *constants)
    return tracks * chunks * column_tiles, work


def _packing(cu_seqlens: Tensor | None, total: int) -> Packing:
    if cu_seqlens is None:
        return Packing(None, None)
    rows = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:].contiguous()
    owners = torch.searchsorted(ends, rows, right=True).clamp(max=ends.shape[0] - 1)
    inside = rows < ends[-1]
    kinds = (
        INSIDE.value
        + FIRST.value * (rows == starts[owners])
        + LAST.value * (rows == ends[owners] - 1)
    )
    return Packing((kinds * inside).to(torch.int32), owners.to(torch.int32))


def parts_of(x: Tensor) -> Tensor:
    """A tensor as kernels see it: complex numbers as pairs."""
    return torch.view_as_real(x) if x.is_complex() else x


def new_states(gates: Tensor, programs: int, work: Work, dtype: torch.dtype) -> Tensor:
    """Scratch with a state for each chunk of each track."""
    width = work.width * (2 if gates.is_complex() else 1)
    return empty(gates, (programs // work.column_tiles, width), dtype)


def flat(x: Tensor | None) -> Tensor | None:
    """A state as kernels see it: contiguous, complex numbers as pairs."""
    return None if x is None else parts_of(x.contiguous())


def view_of(x: Tensor | None) -> View:
    """A tensor of tokens' shape."""
    if x is None:
        return NO_VIEW
    parts = 2 if x.is_complex() else 1
    return View(parts_of(x), parts * x.stride(0) if x.dim() == 3 else 0, parts * x.stride(-2))


def gates_of(gates: Tensor) -> tuple[View, Tensor | None]:
    """(gates by step, constant gates): one of them is absent."""
    return (NO_VIEW, parts_of(gates)) if gates.dim() == 1 else (view_of(gates), None)

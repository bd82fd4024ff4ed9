"""The split of a scan over programs, and its tensors as the kernels take them.

Where channels and tracks alone keep a GPU's memory busy, a program takes all steps of its channels.
Otherwise time is split into chunks of as many steps as a program holds in registers, and programs
tell one another what enters them (`lookback`). The split depends on shapes alone, and nothing is
added atomically: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from resformer_kernels._triton.arch import architecture
from resformer_kernels._triton.launch import capability, empty
from resformer_kernels.scan.triton.steps import FIRST, INSIDE, LAST, Packing, View, Work

PROGRAMS = 512
"""Programs of one warp that keep any GPU's memory busy with what they load at once."""
LEAST_TIME = 256
"""Most steps that are never split."""
STEPS = 32
"""Most steps loaded before the first is processed."""
HELD = 64
"""Registers of a thread for what is loaded; half of them for packed rows, each of which needs
others to say where it belongs."""
CHANNELS = 32
"""Least channels of a program of one warp, a thread each."""
WINDOW = 16
"""Chunks that are combined without waiting for the state after any of them."""


def check_constants() -> None:
    """AssertionError where a constant has a value that kernels cannot be compiled for."""
    assert PROGRAMS >= 1
    assert LEAST_TIME >= 1
    assert STEPS >= 1
    assert HELD >= 12, "three operands of complex packed rows take six registers a step"
    assert WINDOW >= 2
    assert CHANNELS >= 32, "no channel may have copies in several threads"
    assert CHANNELS & (CHANNELS - 1) == 0, "tiles have powers of two"


NO_VIEW = View(None, 0, 0)


def partition(
    like: Tensor, cu_seqlens: Tensor | None, read: Sequence[Tensor], *, reverse: bool
) -> tuple[int, Work]:
    """(number of programs, their argument) for tokens like these; `read`: what is read at every
    step."""
    tracks, time, width = like.shape if like.dim() == 3 else (1, *like.shape)
    block = max(CHANNELS, architecture(capability(like.device)).warp)
    column_tiles = -(-width // block)
    held = HELD if cu_seqlens is None else HELD // 2
    registers = sum(2 if x.is_complex() else 1 for x in read)
    steps = min(STEPS, 1 << ((held // registers).bit_length() - 1))
    chunk = max(1, time)
    if tracks * column_tiles < PROGRAMS and time > LEAST_TIME:
        chunk = steps
    chunks = -(-max(1, time) // chunk)
    constants = (tl.constexpr(x) for x in (like.is_complex(), reverse, steps, block, WINDOW))
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

"""The host side of every Triton kernel: allocating outputs, launching, and recording launches."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from resformer_kernels._triton.arch import STAND_IN


class Launch(NamedTuple):
    """One launch of a kernel: `kernel[grid](**kwargs)`."""

    kernel: Any
    grid: tuple[int, ...]
    kwargs: dict[str, Any]


_assumed: tuple[int, int] | None = None
_recorder: list[Launch] | None = None


@contextmanager
def assumed_capability(capability: tuple[int, int]) -> Iterator[None]:
    """Within it launchers choose for that compute capability, whatever their tensors are on."""
    global _assumed
    before, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = before


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability to choose for; without a GPU the interpreter plays an H100."""
    if _assumed is not None:
        return _assumed
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else STAND_IN


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within it launched kernels do not run: their launches are appended to the list it yields.

    Launchers may be given meta tensors: their storage offsets stand for their alignment.
    """
    global _recorder
    launches: list[Launch] = []
    before, _recorder = _recorder, launches
    try:
        yield launches
    finally:
        _recorder = before


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Run `kernel` on `device`, or record the launch; nothing where the grid is empty."""
    if 0 in grid:
        return
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, arguments))
        return
    if triton.knobs.runtime.interpret:
        import numpy

        # numpy warns where a GPU goes on (inf - inf, an overflowing exponential, a NaN), and about
        # the interpreter's use of it.
        with numpy.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernel[grid](**arguments)
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](**arguments)


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a kernel to write: uninitialised, or NaN under RESFORMER_POISON=1."""
    fresh = like.new_empty(shape, dtype=dtype)
    if os.environ.get("RESFORMER_POISON"):
        fresh.fill_(torch.nan)
    return fresh

"""How Triton kernels of several ops are given a tensor: a pointer and its strides, in tuples."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from resformer_kernels._triton import device
from resformer_kernels._triton.specialise import Stride, Unit


class View(NamedTuple):
    """(batch, time, heads, head_dim) by strides in elements; packed tensors have batch 0, and a
    table has its rows along time."""

    pointer: Tensor | None
    batch: Stride
    time: Stride
    head: Stride


class Coefficient(NamedTuple):
    """A mixing coefficient: a tensor by strides, 0 where it broadcasts, or a number."""

    pointer: Tensor | None
    number: float
    batch: Stride
    time: Stride
    head: Stride
    column: Unit


NOTHING = View(None, 0, 0, 0)


def view_of(tensor: Tensor | None) -> View:
    """A tensor of three or four axes as kernels take it."""
    if tensor is None:
        return NOTHING
    batch = tensor.stride(0) if tensor.dim() == 4 else 0
    return View(tensor, batch, tensor.stride(-3), tensor.stride(-2))


def coefficient_of(tensor: Tensor | None, number: float) -> Coefficient:
    """A tensor of three or four axes, or the number where there is none."""
    if tensor is None:
        return Coefficient(None, float(number), 0, 0, 0, 0)
    strides = [
        0 if size == 1 else stride
        for size, stride in zip((1, *tensor.shape)[-4:], (0, *tensor.stride())[-4:], strict=True)
    ]
    return Coefficient(tensor, 1.0, *strides)


def form_over_tile(coefficient: Coefficient, rows: bool, columns: bool) -> int:
    """Its form as `device.coefficient` has it, where it differs along a tile's rows or not,
    and along its columns or not."""
    if coefficient.pointer is None:
        return int(device.NUMBER.value)
    form = {
        (False, False): device.PER_TILE,
        (True, False): device.PER_ROW,
        (False, True): device.PER_COLUMN,
        (True, True): device.PER_ELEMENT,
    }[rows, columns]
    return int(form.value)

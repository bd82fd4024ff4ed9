"""Strides that kernels read in place, and those that are copied first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

Record = TypeVar("Record", bound=Any)


def needs_copy(tensor: Tensor | None) -> bool:
    """Whether the last axis is not contiguous, which is all that kernels ask of strides."""
    return tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] != 1


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last axis is not contiguous."""
    return tensor.contiguous() if needs_copy(tensor) else tensor


def with_unit_strides(call: Record, names: Sequence[str]) -> Record:
    """A record whose tensors of these names have a contiguous last axis."""
    copied = {name: x.contiguous() for name in names if needs_copy(x := getattr(call, name))}
    return call._replace(**copied) if copied else call


def copy_note(name: str, tensor: Tensor) -> str:
    """What `explain` says of an argument that `needs_copy`."""
    return f"{name} is copied once: its last axis has stride {tensor.stride(-1)}, not 1"


def copy_notes(call: Any, names: Sequence[str]) -> list[str]:
    """What `explain` says of the arguments that `with_unit_strides` copies."""
    return [copy_note(name, x) for name in names if needs_copy(x := getattr(call, name))]

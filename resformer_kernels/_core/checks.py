"""Checks of arguments that every op shares. They read metadata alone."""

from __future__ import annotations

import numbers
import operator
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core import dtensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PYTHON = (int, float, torch.SymInt, torch.SymFloat)
_PLAIN = (Tensor, torch.nn.Parameter)

CAUSAL_BIAS = "torch.nn.attention.bias.CausalBias"
# Subclasses of torch's own whose memory is not their value, and whose `__torch_dispatch__`, if they
# have one, takes no op of this package. By name: importing them costs every import of the package.
_STAND_INS = {
    CAUSAL_BIAS: (
        "a CausalBias, which names a mask without holding one: pass causal=True, whose alignment "
        "is that of causal_lower_right, or a bool mask"
    ),
}


def describe(value: object) -> str:
    """A short account of what an argument was, for error messages."""
    if isinstance(value, Tensor):
        if value.is_nested:  # it has no shape
            return f"a nested tensor of {value.dim()} axes, {value.dtype}, on {value.device}"
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def check_tensor(name: str, value: object, rank: int | tuple[int, ...], axes: str) -> None:
    """TypeError unless `value` is a dense tensor; ValueError unless it has `rank` axes, or as many
    as one of several ranks."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {axes}, got {describe(value)}")
    check_dense(name, value, axes)
    axis_count = value.dim()
    if axis_count != rank and (isinstance(rank, int) or axis_count not in rank):
        raise ValueError(f"{name} must be {axes}, got {describe(value)}")


def check_ids(token_ids: object, axes: str) -> None:
    """TypeError or ValueError unless token_ids is a tensor of two axes of integers."""
    check_tensor("token_ids", token_ids, 2, axes)
    assert isinstance(token_ids, Tensor)
    if token_ids.dtype not in (torch.int64, torch.int32):
        said = ""
        if token_ids.is_floating_point() and not token_ids.numel():
            said = ": torch.tensor of an empty list is one of floats, unless its dtype is given"
        raise TypeError(f"token_ids must be int64 or int32, got {token_ids.dtype}{said}")


def check_dense(name: str, tensor: Tensor, axes: str = "") -> None:
    """TypeError where a tensor's memory, read by its strides, would not be its value.

    Other subclasses are taken: those with memory are read, and the dispatcher hands an op on one
    without memory to its class.
    """
    dense = tensor.layout is torch.strided and not tensor.is_nested
    if dense and type(tensor) in _PLAIN:
        return
    if tensor.is_nested:
        found = f"a nested tensor (layout {tensor.layout})"
    elif not dense:
        found = f"layout {tensor.layout}"
    else:
        kind = stand_in(type(tensor))
        if not kind:
            dtensors.admit(type(tensor))
            return
        found = _STAND_INS[kind]
    raise TypeError(f"{name} must be {f'a dense tensor {axes}'.rstrip()}, got {found}")


def stand_in(kind: type) -> str:
    """Which of torch's classes that only stand for a tensor `kind` is; "" for all others."""
    names = (f"{base.__module__}.{base.__name__}" for base in kind.__mro__)
    return next((name for name in names if name in _STAND_INS), "")


# torch.compile does not trace through the bases of a class.
stand_in._dynamo_marked_constant = True  # type: ignore[attr-defined]


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")


def real(name: str, value: Any) -> Any:
    """`value` as a Python number. Python's and numpy's real numbers are taken, and arrays and
    tensors of no axes that hold one; TypeError for anything else, bool included.
    """
    held = value if type(value) in (int, float) else _held(name, value)
    if isinstance(held, _PYTHON):
        return held
    if not isinstance(held, numbers.Real):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    return float(held)


def integer(name: str, value: Any, least: int | None = None) -> int:
    """`value` as a Python int. What `operator.index` takes is taken, and arrays and tensors of no
    axes that hold such; TypeError for anything else, bool included, ValueError below `least`.
    """
    held = value if type(value) is int else _held(name, value)
    if not isinstance(held, (int, torch.SymInt)):
        try:
            held = operator.index(held)
        except TypeError:
            raise TypeError(f"{name} must be an int, got {describe(value)}") from None
    if least is not None and held < least:
        raise ValueError(f"{name} must be at least {least}, got {held}")
    return held  # type: ignore[return-value]


def alone(value: Any) -> bool:
    """Whether `value` is one thing, not several: it has no axis to walk along."""
    if type(value) in (int, float):
        return True
    return not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0


def integers(name: str, values: Any) -> list[int]:
    """A sequence, array or tensor of one axis as Python ints; TypeError for anything else."""
    if alone(values):
        raise TypeError(f"{name} must be a sequence of ints, got {describe(values)}")
    items = values.tolist() if hasattr(values, "tolist") else values
    return [x if type(x) is int else integer(f"{name}[{i}]", x) for i, x in enumerate(items)]


def _held(name: str, value: Any) -> Any:
    """What an array or tensor of no axes holds, or the value itself; None for a bool or an axis."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name} must be a number, and gets no gradient; got {describe(value)} that requires "
            "one: detach it"
        )
    axes = getattr(value, "ndim", 0)
    held = value.item() if axes == 0 and hasattr(value, "item") else value
    return None if axes or isinstance(held, bool) else held


def check_finite(name: str, x: Tensor, first: Sequence[int] = ()) -> None:
    """ValueError that says where, if `x` holds a NaN or an infinity. `first` is the place of its
    first element in what the caller calls `name`; () stands for zeros.
    """
    wrong = ~x.isfinite()
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        place = tuple(a + b for a, b in zip(at, first or [0] * len(at), strict=True))
        raise ValueError(f"{name} is not finite: {x[tuple(at)].item()} at {place}")


def check_device(name: str, tensor: Tensor, device: torch.device, owner: str = "q") -> None:
    """ValueError unless `tensor` is on `device`, that of the argument called `owner`."""
    if tensor.device != device:
        raise ValueError(f"{name} must be on {owner}'s device {device}, got {tensor.device}")


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which autocast wants an argument of `dtype`; float64 is left alone by it.

    The meta device has no autocast, and asking about it raises.
    """
    kind = device.type
    if dtype is torch.float64 or not dtype.is_floating_point or kind == "meta":
        return dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


def autocast(x: Tensor) -> Tensor:
    """An argument in the dtype in which autocast wants it."""
    wanted = autocast_dtype(x.device, x.dtype)
    return x if x.dtype is wanted else x.to(wanted)


def readable(tensor: Tensor) -> bool:
    """Whether a check may read what the tensor holds, not its metadata alone."""
    # Subclasses (fake, functional, distributed tensors) stand for values that are not there, and
    # reading from a GPU would synchronise with it.
    if torch.compiler.is_compiling() or type(tensor) is not Tensor:
        return False
    kind = tensor.device.type
    return kind == "cpu" or (kind != "meta" and os.environ.get("RESFORMER_CHECK") == "1")


def check_cu_seqlens(
    cu_seqlens: object,
    name: str,
    rows: Tensor,
    extent: str | None,
    *,
    argument: str = "cu_seqlens",
    sequences: str = "sequences",
) -> list[int] | None:
    """Check the offsets of sequences packed along the first axis of `rows`, which is called `name`.

    `extent` says in an error how many rows there are, as in "the {} tokens"; None: they lie
    elsewhere, and their number is not checked. `argument` is what the caller calls the offsets, and
    `sequences` their number. Returns the offsets where they may be read.
    """
    check_tensor(argument, cu_seqlens, 1, f"({sequences} + 1,), int32")
    assert isinstance(cu_seqlens, Tensor)
    if cu_seqlens.dtype is not torch.int32:
        raise TypeError(f"{argument} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != rows.device:
        owner = f"{name}'" if name.endswith("s") else f"{name}'s"
        raise ValueError(
            f"{argument} must be on {owner} device {rows.device}, got {cu_seqlens.device}"
        )
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{argument} must have {sequences} + 1 entries, got none")
    if not readable(cu_seqlens):
        return None
    offsets: list[int] = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{argument} must start at 0, got {offsets[0]}")
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ValueError(
                f"{argument} must not decrease, got {offsets[i]} after {offsets[i - 1]} "
                f"at index {i}"
            )
    if extent is not None and offsets[-1] > rows.shape[0]:
        raise ValueError(
            f"{argument} must end within {extent.format(rows.shape[0])}, got {offsets[-1]}"
        )
    return offsets

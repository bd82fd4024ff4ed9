"""DTensors, told by the name of their class: importing them costs every import of the package."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CLASS = "torch.distributed.tensor.DTensor"
_RULES = "resformer_kernels.distributed.sharding"

_PLAIN = (Tensor, torch.nn.Parameter)
_KNOWN = (Tensor, type(None), float, int, bool, torch.nn.Parameter, str)

_rules: list[Any] = []
"""The module of sharding rules, once a DTensor has come."""


def is_dtensor(kind: type) -> bool:
    """Whether `kind` is DTensor's class or made from it."""
    return kind not in _PLAIN and any(
        f"{base.__module__}.{base.__name__}" == _CLASS for base in kind.__mro__
    )


def admit(kind: type) -> None:
    """Have the ops take tensors of this class, if it is DTensor's: its rules are loaded once."""
    if not seen() and is_dtensor(kind):
        _rules.append(importlib.import_module(_RULES))


def seen() -> bool:
    """Whether an op was given a DTensor before."""
    return bool(_rules)


def replicates() -> bool:
    """Whether torch takes a plain tensor beside DTensors as one that every rank has whole."""
    return bool(torch._C._get_dtensor_allow_implicit_replication())


# torch.compile traces neither imports nor the bases of a class.
is_dtensor._dynamo_marked_constant = True  # type: ignore[attr-defined]
admit._dynamo_marked_constant = True  # type: ignore[attr-defined]
replicates._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reason(call: Any) -> str | None:
    """Why a backend that is not made of this package's ops cannot serve a call; None where no
    tensor of it is a DTensor."""
    if seen() and any(is_dtensor(type(x)) for _, x in _tensors(call)):
        return "what it runs has no sharding rules, and these are DTensors"
    return None


def refuse_mixed(call: Any) -> None:
    """TypeError where some tensors of a record are DTensors and others are not; ValueError where
    their meshes differ."""
    if not seen() or all(type(x) in _KNOWN for x in call):
        return
    tensors = list(_tensors(call))
    owner, like = tensors[0]
    distributed = is_dtensor(type(like))
    for name, x in tensors[1:]:
        if is_dtensor(type(x)) != distributed:
            if replicates():
                continue
            if distributed:
                raise TypeError(
                    f"{name} must be a DTensor, as {owner} is, got a plain tensor: "
                    "torch.distributed.tensor.distribute_tensor makes it one"
                )
            raise TypeError(
                f"{name} must be a plain tensor, as {owner} is, got a DTensor: pass its "
                f"to_local(), or make {owner} a DTensor too"
            )
        if distributed and x.device_mesh != like.device_mesh:
            raise ValueError(
                f"{name} must be on {owner}'s mesh {like.device_mesh}, got {x.device_mesh}"
            )


def refuse(function: str, **arguments: Any) -> None:
    """TypeError where an argument of `function`, which does more than this package's ops, is a
    DTensor."""
    for name, x in arguments.items():
        if type(x) not in _KNOWN and is_dtensor(type(x)):
            raise TypeError(
                f"{name} must be a plain tensor, got a DTensor, whose rows {function} cannot "
                "reorder or rotate: pass its to_local()"
            )


def _tensors(call: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, tensor) of all that a record holds, in nested records and in lists too."""
    if isinstance(call, Tensor):
        yield name, call
    elif isinstance(call, tuple) and hasattr(call, "_fields"):  # torch.compile asks no SymInt
        for field, value in zip(call._fields, call, strict=True):
            yield from _tensors(value, field)
    elif isinstance(call, (list, tuple)):
        for i, value in enumerate(call):
            yield from _tensors(value, f"{name}[{i}]")


def placed_like(gradient: Any, leaf: Any) -> Any:
    """A gradient, placed as its leaf is. A sum over ranks that is still to be made (`Partial`) is
    made here: an optimizer, a norm and a checkpoint then meet gradients placed as parameters are.
    A leaf that is such a sum itself has no place to take over."""
    if leaf is None or not hasattr(gradient, "placements"):
        return gradient
    if gradient.shape != leaf.shape:  # it was not asked for
        return gradient
    if not hasattr(leaf, "placements"):  # a plain tensor, that torch was told to take as replicated
        return gradient.full_tensor()
    if any(place.is_partial() for place in leaf.placements):
        return gradient
    return gradient.redistribute(placements=leaf.placements)

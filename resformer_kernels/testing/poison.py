"""Uninitialised memory filled with NaN, so that a kernel which leaves a hole is caught."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_VARIABLE = "RESFORMER_POISON"
_UNINITIALISED = (
    torch.empty,
    torch.empty_like,
    torch.empty_strided,
    Tensor.new_empty,
    Tensor.new_empty_strided,
)


class _PoisonEmpty(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func in _UNINITIALISED and result.is_floating_point():
            result.fill_(torch.nan)
        return result


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Within it, an environment variable has a value; after it, the one before."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it, memory that a kernel ought to write starts as NaN.

    Covers `torch.empty` and its relatives called from Python, and (by the environment variable
    RESFORMER_POISON) the outputs and scratch memory of the native library.
    """
    with environment(_VARIABLE, "1"), _PoisonEmpty():
        yield

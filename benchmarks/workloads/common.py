"""Shared by the cases: how a contestant is called, and the reasons for its absence."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from resformer_kernels import explain
from resformer_kernels.bench.timing import Call, Unavailable, timed_call

COMPILED = "torch.compile"
FLASH_ATTN = "flash-attn"

Makers = dict[str, Callable[[], Call]]


def require_kernel(
    function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]
) -> None:
    """`Unavailable` where no kernel serves `function(*arguments, **options)`."""
    found = explain(function, *arguments, **options)
    if found.backend in (None, "reference"):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.reasons.items())
        raise Unavailable(f"no kernel serves it ({reasons})")


def require_package(module: str) -> None:
    """`Unavailable` where the package is not installed."""
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed")


def cuda_only(module: str) -> NoReturn:
    """The maker of a peer that no CPU runs: always `Unavailable`."""
    require_package(module)
    raise Unavailable(f"{module} runs on CUDA tensors alone")


@functools.cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` through torch.compile, anew for each shape; its gradient can be taken again."""
    # A backward that reuses its buffers cannot run twice on one graph, and a function that was
    # compiled often enough would run uncompiled from then on.
    for module, option, value in (
        ("torch._functorch.config", "donated_buffer", False),
        ("torch._dynamo.config", "recompile_limit", 256),
    ):
        setattr(importlib.import_module(module), option, value)
    made: Callable[..., Tensor] = torch.compile(function, dynamic=False)
    return made


class Workload:
    """Base of the cases. A subclass is a frozen dataclass with these fields among its own."""

    dtype: torch.dtype
    direction: str
    """"forward" or "backward"."""
    device: str

    def call(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        options: Mapping[str, Any] | None = None,
    ) -> Call:
        """`function(*arguments, **options)`, or the gradients of the floating tensors in them."""
        given = options or {}
        leaves = [x for x in tree_leaves((arguments, given)) if _differentiable(x)]
        return timed_call(lambda: function(*arguments, **given), leaves, self.direction)

    def ours(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        options: Mapping[str, Any] | None = None,
    ) -> Call:
        """`call` of a public op; `Unavailable` on a GPU where no kernel serves it."""
        if self.device != "cpu":
            require_kernel(function, arguments, options or {})
        return self.call(function, arguments, options)


def _differentiable(x: object) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())

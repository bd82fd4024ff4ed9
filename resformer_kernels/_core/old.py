"""What native backends do around a kernel, whichever op it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def needs_copy(tensor: Tensor | None) -> bool:
    """Whether the last axis is not contiguous, which is all that kernels ask of strides."""
    return tensor is not None and tensor.stride(-1) != 1 and tensor.shape[-1] != 1


def copy_note(name: str, tensor: Tensor) -> str:
    """What `explain` says of an argument that `needs_copy`."""
    return f"{name} is copied once: its last axis has stride {tensor.stride(-1)}, not 1"


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, copied where its last axis is not contiguous."""
    return tensor.contiguous() if needs_copy(tensor) else tensor


def refuse_forward_mode(op: str, leaves: Iterable[Tensor | None]) -> None:
    """RuntimeError where a leaf carries a forward-mode tangent: an op drops it without a word."""
    for leaf in leaves:
        if leaf is not None and forward_ad.unpack_dual(leaf).tangent is not None:
            raise RuntimeError(
                f"{op} has no forward-mode derivative (jvp); backend='reference' has"
            )


def distinct(tensors: Iterable[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The same tensors, none of them twice: torch.compile takes none twice in a Function."""
    seen: list[Tensor | None] = []
    for tensor in tensors:
        repeated = tensor is not None and any(tensor is other for other in seen)
        seen.append(tensor.view_as(tensor) if tensor is not None and repeated else tensor)
    return tuple(seen)


def wants_gradient(leaves: Iterable[Tensor | None]) -> bool:
    """Whether autograd would record a call on these leaves."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)


def vmap_error(op: str) -> str:
    """What an op that has no batching rule says."""
    return (
        f"{op} does not support torch.func.vmap: it takes a batch axis of its own; fold the mapped "
        "axis into that instead"
    )


def run_backward(op: str, run: Callable[..., Any], *arguments: Any) -> tuple[Tensor, ...]:
    """`run(*arguments)`, a backward kernel; differentiating its result raises, naming `op`.

    Tensors must stand among the arguments themselves, not in lists: autograd looks no deeper.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # create_graph=True: the gradients may be used, and only their own gradient is missing.
        return tuple(_Once.apply(op, run, *arguments))
    return tuple(run(*arguments))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(_op: str, run: Callable[..., Any], *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(run(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        del output
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> NoReturn:
        raise RuntimeError(
            f"{ctx.op} does not support double backward: its gradient cannot be differentiated "
            "again (backend='reference' can)"
        )

    @staticmethod
    def vmap(_info: Any, _in_dims: Any, op: str, *_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(op))

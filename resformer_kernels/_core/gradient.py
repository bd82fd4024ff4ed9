"""What an op's autograd.Function does around its ops, whichever op it is.

`apply` takes (namespace, *call): the namespace of the ops, then the record's fields in the schema's
order. A leaf is found by its field's name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from resformer_kernels._core.op import Op, vmap_error

Record = TypeVar("Record", bound=tuple[Any, ...])


def refuse_forward_mode(function: str, leaves: Iterable[Tensor | None]) -> None:
    """RuntimeError where a leaf carries a forward-mode tangent: an op would drop it silently."""
    for leaf in leaves:
        if leaf is not None and forward_ad.unpack_dual(leaf).tangent is not None:
            raise RuntimeError(
                f"{function} has no forward-mode derivative (jvp); backend='reference' has"
            )


def wants_gradient(leaves: Iterable[Tensor | None]) -> bool:
    """Whether autograd would record a call on these leaves."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leaves)


def distinct(call: Record) -> Record:
    """The record, or tuple, with a view in place of each tensor that it holds a second time:
    torch.compile takes none twice in an autograd.Function."""
    seen: list[Any] = []
    for value in call:
        repeated = isinstance(value, Tensor) and any(value is other for other in seen)
        seen.append(value.view_as(value) if repeated else value)
    return type(call)(*seen) if hasattr(call, "_fields") else type(call)(seen)


def save(ctx: Any, call: Sequence[Any], *more: Tensor | None) -> None:
    """Save a record for backward, and further tensors after it."""
    tensors = [x if isinstance(x, Tensor) else None for x in call]
    ctx.others = tuple(None if isinstance(x, Tensor) else x for x in call)
    ctx.save_for_backward(*tensors, *more)
    ctx.set_materialize_grads(False)


def saved(ctx: Any, record: Any) -> tuple[Any, ...]:
    """(the record, the further tensors) of `save`."""
    # Non-reentrant checkpointing computes again at the first read, and refuses a second.
    tensors = ctx.saved_tensors
    count = len(ctx.others)
    call = [t if t is not None else x for t, x in zip(tensors[:count], ctx.others, strict=True)]
    return (record(*call), *tensors[count:])


def wanted(ctx: Any, record: Any, leaves: Sequence[str]) -> tuple[bool, ...]:
    """Which leaves want a gradient, in their order."""
    needed = dict(zip(record._fields, ctx.needs_input_grad[1:], strict=True))
    return tuple(needed[name] for name in leaves)


def mask_of(needs: Iterable[bool]) -> int:
    """`grad_mask`: bit i is set where leaf i wants a gradient."""
    return sum(1 << bit for bit, needed in enumerate(needs) if needed)


def in_place_of(
    record: Any, leaves: Sequence[str], gradients: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """What a backward returns for apply(namespace, *call): each leaf's gradient in its place."""
    found = {
        name: gradient if needed else None
        for name, gradient, needed in zip(leaves, gradients, needs, strict=True)
    }
    return (None, *(found.get(name) for name in record._fields))


def run_backward(op: Op, namespace: str, call: Any) -> tuple[Tensor, ...]:
    """`op(namespace, call)`, a backward op; differentiating its results raises."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return tuple(op(namespace, call))
    # Autograd looks for tensors in no record and in no list.
    leaves, form = tree_flatten(op.flatten(call))
    return once(op.function, lambda *x: op(namespace, op.read(tree_unflatten(x, form))), leaves)


def once(
    function: str, run: Callable[..., Sequence[Tensor]], leaves: Sequence[Any]
) -> tuple[Tensor, ...]:
    """`run(*leaves)`, the gradient of a public function; differentiating its results raises."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # create_graph=True: the gradients may be used, and only their own gradient is missing.
        return tuple(_Once.apply(function, run, *leaves))
    return tuple(run(*leaves))


class _Once(torch.autograd.Function):
    """apply(function, run, *leaves) -> run(*leaves)."""

    @staticmethod
    def forward(_function: str, run: Callable[..., Any], *leaves: Any) -> tuple[Tensor, ...]:
        return tuple(run(*leaves))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        del output
        ctx.function = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> NoReturn:
        raise RuntimeError(
            f"{ctx.function} does not support double backward: its gradient cannot be "
            "differentiated again (backend='reference' can)"
        )

    @staticmethod
    def vmap(_info: Any, _in_dims: Any, function: str, *_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(function))

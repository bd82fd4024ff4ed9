"""What an op's autograd.Function does around its ops, whichever op it is.

`apply` takes (namespace, *call): the namespace of the ops, then the record's fields in the schema's
order; or, where there are many, `Parts`. A leaf is found by its field's name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_unflatten

from resformer_kernels._core import dtensors
from resformer_kernels._core.op import Op, vmap_error

Record = TypeVar("Record", bound=tuple[Any, ...])
F = TypeVar("F", bound=Callable[..., Any])


class _Given(NamedTuple):
    """Arguments that are bound as they are given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def apply_defaults(self) -> None:
        """There are none."""


class _AsGiven(inspect.Signature):
    """The signature of a function without defaults, called by position."""

    def bind(self, /, *args: object, **kwargs: object) -> Any:
        return _Given(args, kwargs)


def signed(forward: F) -> F:
    """Mark the `forward` of an autograd.Function, which has no defaults: torch binds its arguments
    to its signature in every call, and takes the signature that a function carries."""
    parameters = list(inspect.signature(forward).parameters.values())
    forward.__signature__ = _AsGiven(parameters)  # type: ignore[attr-defined]
    return forward


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


@contextmanager
def recording() -> Iterator[None]:
    """Within it autograd records, in an op's kernel too: a TorchDispatchMode runs that one, and
    what it calls, below autograd."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def distinct(call: Record) -> Record:
    """The record, or tuple, with a view in place of each tensor that it holds a second time:
    torch.compile takes none twice in an autograd.Function."""
    seen: list[Any] = []
    for value in call:
        repeated = isinstance(value, Tensor) and any(value is other for other in seen)
        seen.append(value.view_as(value) if repeated else value)
    return type(call)(*seen) if hasattr(call, "_fields") else type(call)(seen)


class Parts:
    """A record in two: its tensors, which autograd follows, and the rest. An autograd.Function is
    slower by every argument: its apply takes (namespace, rest, *tensors).

    Args:
        record: the type of the record.
        tensors: the names of its fields that hold tensors, in order.
    """

    def __init__(self, record: Any, tensors: Sequence[str]) -> None:
        self.record, self.tensors = record, tuple(tensors)
        self._tensors = [record._fields.index(name) for name in tensors]
        self._rest = [i for i in range(len(record._fields)) if i not in self._tensors]
        both = self._tensors + self._rest
        self._order = [both.index(i) for i in range(len(both))]

    def split(self, call: Any) -> tuple[Any, ...]:
        """(rest, *tensors) of a record."""
        return (tuple(call[i] for i in self._rest), *[call[i] for i in self._tensors])

    def join(self, rest: Sequence[Any], tensors: Sequence[Any]) -> Any:
        """The record: the inverse of `split`."""
        both = (*tensors, *rest)
        return self.record(*[both[i] for i in self._order])

    def wanted(self, ctx: Any, leaves: Sequence[str]) -> tuple[bool, ...]:
        """Which leaves want a gradient, in their order."""
        needed = ctx.needs_input_grad[2:]
        return tuple(needed[self.tensors.index(name)] for name in leaves)

    def in_place(
        self, leaves: Sequence[str], gradients: Sequence[Any], needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """What a backward returns for apply(namespace, rest, *tensors)."""
        found = _by_name(leaves, gradients, needs)
        return (None, None, *[found.get(name) for name in self.tensors])


def wanted(ctx: Any, record: Any, leaves: Sequence[str]) -> tuple[bool, ...]:
    """Which leaves want a gradient, in their order."""
    needed = dict(zip(record._fields, ctx.needs_input_grad[1:], strict=True))
    return tuple(needed[name] for name in leaves)


def mask_of(needs: Iterable[bool]) -> int:
    """`grad_mask`: bit i is set where leaf i wants a gradient."""
    return sum(1 << bit for bit, needed in enumerate(needs) if needed)


def in_place_of(
    record: Any, leaves: Sequence[str], gradients: Sequence[Any], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """What a backward returns for apply(namespace, *call): each leaf's gradient in its place."""
    found = _by_name(leaves, gradients, needs)
    return (None, *[found.get(name) for name in record._fields])


def _by_name(
    leaves: Sequence[str], gradients: Sequence[Any], needs: Sequence[bool]
) -> dict[str, Any]:
    wanted = zip(leaves, gradients, needs, strict=True)
    return {name: gradient for name, gradient, needed in wanted if needed}


def run_backward(
    op: Op, namespace: str, call: Any, leaves: Sequence[Any] | None = None
) -> tuple[Tensor, ...]:
    """`op(namespace, call)`, a backward op; differentiating its results raises. `leaves` are those
    whose gradients the results are, where these are not called d and a leaf's name."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        gradients = tuple(op(namespace, call))
    else:
        # Autograd looks for tensors in no record and in no list.
        flat, form = tree_flatten(op.flatten(call))
        gradients = once(
            op.function, lambda *x: op(namespace, op.read(tree_unflatten(x, form))), flat
        )
    if not dtensors.seen():
        return gradients
    if leaves is None:
        arguments = op.flatten(call)
        leaves = [None if i is None else arguments[i] for i in op.leaves]
    pairs = zip(gradients, leaves, strict=True)
    return tuple(dtensors.placed_like(gradient, leaf) for gradient, leaf in pairs)


def once(
    function: str, run: Callable[..., Sequence[Tensor]], leaves: Sequence[Any]
) -> tuple[Tensor, ...]:
    """`run(*leaves)`, the gradient of a public function; differentiating its results raises."""
    # create_graph=True: the gradients may be used, and only their own gradient is missing.
    missing = (
        f"{function} does not support double backward: its gradient cannot be differentiated "
        "again (backend='reference' can)"
    )
    return without_gradient(function, missing, run, leaves)


def without_gradient(
    function: str, missing: str, run: Callable[..., Sequence[Tensor]], leaves: Sequence[Any]
) -> tuple[Tensor, ...]:
    """`run(*leaves)` for a public function; differentiating its results raises `missing`."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return tuple(_Undifferentiable.apply(function, missing, run, *leaves))
    return tuple(run(*leaves))


class _Undifferentiable(torch.autograd.Function):
    """apply(function, missing, run, *leaves) -> run(*leaves)."""

    @staticmethod
    @signed
    def forward(
        _function: str, _missing: str, run: Callable[..., Any], *leaves: Any
    ) -> tuple[Tensor, ...]:
        return tuple(run(*leaves))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        del output
        ctx.missing = inputs[1]

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> NoReturn:
        raise RuntimeError(ctx.missing)

    @staticmethod
    def vmap(_info: Any, _in_dims: Any, function: str, *_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(function))


def seeing(x: Tensor, leaves: Sequence[Tensor | None]) -> Tensor:
    """x, from which leaves that nothing has read have gradients of zeros, as from a kernel."""
    for leaf in leaves:
        if leaf is not None:
            x = x + leaf.flatten()[:0].sum().to(x.dtype)
    return x

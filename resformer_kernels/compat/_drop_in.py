"""Drop-ins as translations: what a function of another library asks for, as a call of an op."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

from resformer_kernels._core.select import Request, explained_by, prepare

P = ParamSpec("P")
R = TypeVar("R")


class _OpCall(NamedTuple):
    """An op, its arguments by name, what to compute before it, and what to make of its result."""

    op: Callable[..., Any]
    arguments: dict[str, Any]
    before: Callable[[], dict[str, Any]] | None
    finish: Callable[[Any], Any]


def call_op(
    op: Callable[..., Any],
    arguments: dict[str, Any],
    finish: Callable[[Any], R],
    before: Callable[[], dict[str, Any]] | None = None,
) -> R:
    """What the body of a `drop_in` returns. Typed as the result that its caller gets.

    `before` computes arguments that replace those of the same names, which have their shapes and
    dtypes: `explain` leaves it out, since it computes nothing.
    """
    return cast(R, _OpCall(op, arguments, before, finish))


def drop_in(translate: Callable[P, R]) -> Callable[P, R]:
    """The public function of a translation, whose body checks its arguments and ends in `call_op`.

    Calling the function runs the op; `explain` asks the op about the same arguments.
    """

    def prepared(*args: P.args, **kwargs: P.kwargs) -> Request:
        call = cast(_OpCall, translate(*args, **kwargs))
        return prepare(call.op, **call.arguments)

    @explained_by(prepared)
    @wraps(translate)
    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        call = cast(_OpCall, translate(*args, **kwargs))
        changed = call.before() if call.before else {}
        return cast(R, call.finish(call.op(**{**call.arguments, **changed})))

    return function

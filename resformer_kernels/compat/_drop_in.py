"""Drop-ins as translations of another library's arguments into the call of an op."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

from resformer_kernels._core.select import Request, explained_by, prepare

P = ParamSpec("P")
R = TypeVar("R")


class _OpCall(NamedTuple):
    """A call of an op: its arguments by name, and the functions applied before and after it."""

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
    """The return value of a `drop_in`'s body, typed as the result that the caller gets.

    Args:
        op: the op to call.
        arguments: its arguments by name.
        finish: maps the op's result to the drop-in's.
        before: computes replacements for some arguments, of the same shapes and dtypes. `explain`
            skips it, so that it computes nothing.
    """
    return cast(R, _OpCall(op, arguments, before, finish))


def drop_in(translate: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose body checks its arguments and returns a `call_op`.

    Calling the decorated function runs the op; `explain` explains the op's call.
    """

    def prepared(*args: P.args, **kwargs: P.kwargs) -> Request:
        call: Any = translate(*args, **kwargs)
        return prepare(call.op, **call.arguments)

    @explained_by(prepared)
    @wraps(translate)
    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        call: Any = translate(*args, **kwargs)
        arguments = call.arguments if call.before is None else call.arguments | call.before()
        result: R = call.finish(call.op(**arguments))
        return result

    return function

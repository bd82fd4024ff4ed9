"""Errors of the drop-ins: those of this package, caught as those of the originals too.

PyTorch's and FlashAttention's kernels raise RuntimeError for a wrong shape or dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class ArgumentValueError(ValueError, RuntimeError):
    """A wrong shape, device or range."""


class ArgumentTypeError(TypeError, RuntimeError):
    """A wrong type or dtype."""


_ALSO_RUNTIME: dict[type[Exception], type[Exception]] = {
    ValueError: ArgumentValueError,
    TypeError: ArgumentTypeError,
}


def runtime_errors(**renamed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: every ValueError and TypeError of a drop-in is a RuntimeError too.

    `renamed` gives the drop-in's names of arguments that errors call otherwise.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def drop_in(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except (ValueError, TypeError) as error:
                kind = _ALSO_RUNTIME.get(type(error))
                if kind is None:
                    raise
                message = str(error)
                for ours, theirs in renamed.items():
                    message = message.replace(ours, theirs)
                raise kind(message).with_traceback(error.__traceback__) from None

        return drop_in

    return decorate

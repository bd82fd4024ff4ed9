"""Triton's interpreter, five times faster: for tests that run many tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def quick() -> Iterator[None]:
    """Within it the interpreter does not repeat work.

    Otherwise it replaces triton.language's functions at every call of a device function, and
    repeats every integer operation in 64 bits to look for an overflow.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang
    seen: dict[Callable[..., Any], list[Any]] = {}

    def replace_once(function: Callable[..., Any]) -> Any:
        if function not in seen:
            found = function.__globals__.values()
            seen[function] = [x for x in (tl, tl.core) if any(y is x for y in found)]
        if any(tl.core.is_builtin(module.arange) for module in seen[function]):
            return replace(function)
        return interpreter._LangPatchScope()

    options = interpreter.InterpreterOptions(sanitize_overflow=False)
    with (
        mock.patch.object(interpreter, "_patch_lang", replace_once),
        mock.patch.object(interpreter.interpreter_builder, "options", options),
    ):
        yield

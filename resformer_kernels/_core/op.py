"""An op of torch.library, made from its record.

A record is a NamedTuple whose fields are the op's arguments in the schema's order; a field that is
itself a record contributes its fields in its place. `Op` derives the schema from the annotations
and registers the op in two namespaces: `resformer`, whose kernels C++ supplies, and
`resformer_triton`, whose launcher is imported, and Triton with it, at the first call.

C++ reads arguments by position: `tests/test_records.py` holds its signatures to the records.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any, NoReturn, TypeAlias, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

NATIVE, TRITON = "resformer", "resformer_triton"

SymInt: TypeAlias = Annotated[int, "SymInt"]
"""An int that torch.compile may keep symbolic."""

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    tuple[Tensor, ...]: "Tensor[]",
    tuple[float, ...]: "float[]",
    tuple[int, ...]: "int[]",
    float: "float",
    int: "int",
    bool: "bool",
    str: "str",
}

OPS: dict[str, Op] = {}
"""Every op by its name."""

_libraries: list[torch.library.Library] = []  # a library unregisters its ops when it is collected


@functools.cache
def _hints(record: Any) -> dict[str, Any]:
    """The annotations of a record, evaluated: ops share records, and every import pays for it."""
    return get_type_hints(record, include_extras=True)


def _fields(record: Any) -> Iterator[tuple[str, Any]]:
    """(name, annotation) of every field, those of nested records in place."""
    for name, kind in _hints(record).items():
        if hasattr(kind, "_fields"):
            yield from _fields(kind)
        else:
            yield name, kind


def _declared(name: str, kind: Any) -> str:
    written = get_args(kind)[1] if get_origin(kind) is Annotated else _TYPES[kind]
    return f"{written} {name}"


def field_names(record: Any) -> list[str]:
    """The op's arguments in the schema's order."""
    return [name for name, _ in _fields(record)]


def vmap_error(function: str) -> str:
    """The error of an op that has no batching rule; `function` is the public function."""
    return (
        f"{function} does not support torch.func.vmap: it takes a batch axis of its own; fold the "
        "mapped axis into that instead"
    )


def refuse_vmap(function: str, values: Iterable[Any]) -> None:
    """RuntimeError where one of the tensors among `values` is mapped by torch.func.vmap."""
    if torch.compiler.is_compiling():
        return
    if any(isinstance(x, Tensor) and torch._C._functorch.is_batchedtensor(x) for x in values):
        raise RuntimeError(vmap_error(function))


class Op:
    """One op in both namespaces.

    Args:
        name: of the op.
        record: NamedTuple type of its arguments. Annotations give the schema's types; `Annotated`
            gives one in words, such as `Annotated[Tensor, "Tensor(a!)"]`.
        returns: the schema's result, such as "(Tensor out, Tensor lse)".
        function: the public function, as errors call it.
        fake: fake(call) -> results on meta tensors, for torch.compile and torch.export.
        triton: "module:function" of the Triton launcher, called with the record.
        composed: "module:function" of an implementation in Python over other ops, called with the
            namespace and the record, in each namespace that has no kernel of its own.
    """

    def __init__(
        self,
        name: str,
        record: Any,
        returns: str,
        *,
        function: str,
        fake: Callable[[Any], Any],
        triton: str | None = None,
        composed: str | None = None,
    ) -> None:
        self.name, self.record, self.function = name, record, function
        arguments = ", ".join(_declared(*field) for field in _fields(record))
        self.schema = f"{name}({arguments}) -> {returns}"
        names = field_names(record)
        results = (part.split()[-1] for part in returns.strip("()").split(","))
        self.leaves = [names.index(x[1:]) if x[1:] in names else None for x in results]
        """Of a backward op: for each result, named d and a leaf, the place of that argument."""
        self._fake, self.triton, self.composed = fake, triton, composed
        hints = _hints(record)
        self._nested = [(i, hints[f]) for i, f in enumerate(record._fields) if _is_record(hints[f])]
        OPS[name] = self
        _libraries.extend((self.define(NATIVE), self.define(TRITON, triton)))

    def define(
        self,
        namespace: str,
        launcher: str | None = None,
        keys: tuple[str, ...] = ("CPU", "CUDA"),
    ) -> torch.library.Library:
        """Register the op in a namespace, `launcher` ("module:function", called with the record)
        behind it on the dispatch keys named. It goes when the library that is returned does."""
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(self.schema)
        qualified = f"{namespace}::{self.name}"
        torch.library.register_fake(qualified, self._call(self._fake), lib=library)
        library.impl(self.name, self._refuse_vmap, "FuncTorchBatched")
        made = None
        if launcher is not None:
            made = (self._replayed if namespace == TRITON else self._lazy)(launcher)
        elif self.composed is not None:
            made = self._lazy(self.composed, namespace)
        # CPU tensors are for Triton's interpreter, and for what stands in for a package in tests.
        for key in keys if made is not None else ():
            library.impl(self.name, made, key)
        return library

    def __call__(self, namespace: str, call: Any) -> Any:
        """Run the op of `namespace` on a record."""
        return getattr(getattr(torch.ops, namespace), self.name).default(*self.flatten(call))

    def flatten(self, call: Any) -> tuple[Any, ...]:
        """The op's arguments: the record's fields, those of nested records in place."""
        if not self._nested:
            return tuple(call)
        nested = {i for i, _ in self._nested}
        return tuple(y for i, x in enumerate(call) for y in (x if i in nested else (x,)))

    def read(self, arguments: tuple[Any, ...]) -> Any:
        """The record of the op's arguments: the inverse of `flatten`."""
        given = list(arguments)
        for place, record in self._nested:
            stop = place + len(record._fields)
            given[place:stop] = [record(*given[place:stop])]
        return self.record(*given)

    def _call(self, function: Callable[..., Any], *first: Any) -> Callable[..., Any]:
        def with_record(*arguments: Any) -> Any:
            return function(*first, self.read(arguments))

        return with_record

    def _lazy(self, target: str, *first: Any) -> Callable[..., Any]:
        module, _, name = target.partition(":")

        def implementation(*arguments: Any) -> Any:
            return getattr(importlib.import_module(module), name)(*first, self.read(arguments))

        return implementation

    def _replayed(self, target: str) -> Callable[..., Any]:
        """The Triton launcher, and Triton with it, from the first call on."""
        launcher = self._lazy(target)
        made: list[Callable[..., Any]] = []

        def implementation(*arguments: Any) -> Any:
            if not made:
                tape = importlib.import_module("resformer_kernels._triton.tape")
                made.append(tape.Replayed(self.name, launcher))
            return made[0](arguments)

        return implementation

    def _refuse_vmap(self, *_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(self.function))


def _is_record(value: Any) -> bool:
    return hasattr(value, "_fields")

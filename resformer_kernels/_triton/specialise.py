"""What a kernel is compiled for, given its arguments.

Triton makes a constant of every integer that is 1, and tells the compiler which are multiples of
16: whatever varies with shapes is then compiled again and again, about a second each. Here an
integer is a run-time number unless its record's field says what is worth a compilation:

- `Unit`: whether it is 1, the stride of an innermost axis.
- `Stride`: whether it is a multiple of 16, which vector loads need. The strides of a record are so
  together or not at all, and not where its `Unit` is not 1: nothing there is loaded as a vector.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, NamedTuple, TypeAlias, get_type_hints

import triton.language as tl
from torch import Tensor
from triton.runtime.jit import mangle_type
from triton.tools.tensor_descriptor import TensorDescriptor

_UNIT, _EVEN = "unit", "even"
Stride: TypeAlias = Annotated[int, "stride"]
Unit: TypeAlias = Annotated[int, _UNIT]

ALIGNMENT = 16
"""Of addresses in bytes, and of strides in elements, that the compiler is told of."""
_LARGE = 2**31
_DIVISIBLE = [["tt.divisibility", ALIGNMENT]]
Path: TypeAlias = tuple[int, ...]
"""The place of a number among nested arguments."""


class Specialised(NamedTuple):
    """What a kernel is compiled for, in Triton's terms."""

    signature: dict[str, Any]
    """Types by name; "constexpr" for constants."""
    constants: dict[Path, Any]
    attrs: dict[Path, list[list[Any]]]
    options: dict[str, Any]
    """Of the compiler, such as num_warps."""


class _Notes(NamedTuple):
    """What a record's fields say is worth a compilation."""

    fields: tuple[str, ...]
    """Each field's annotation; "" where nothing is."""
    units: tuple[int, ...]
    """Places of units."""
    strides: tuple[tuple[int, ...], ...]
    """Places of strides, those together that are multiples of 16 together."""


def identity(kernel: Any, arguments: dict[str, Any]) -> Any:
    """Equal where one compiled kernel serves both launches: in short what `specialised` says."""
    names, constants = _parameters(kernel)
    found: list[Any] = [kernel]
    for name, value in arguments.items():
        if name in constants or name not in names:
            found.append((name, _plain(value)))
        else:
            found.append((name, _form(value, "")))
    return tuple(found)


@functools.cache
def _parameters(kernel: Any) -> tuple[frozenset[str], frozenset[str]]:
    """(names of parameters, those that are constants)."""
    constants = (x.name for x in kernel.params if x.is_constexpr)
    return frozenset(x.name for x in kernel.params), frozenset(constants)


def _form(value: Any, note: str) -> Any:
    """What `_type_of` would find, without its place."""
    kind: Any = type(value)
    if kind is int:
        return _UNIT if note == _UNIT and value == 1 else -_LARGE <= value < _LARGE
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % ALIGNMENT == 0
    if isinstance(value, tuple):
        notes = _notes(kind)
        if notes is None:
            return tuple([_form(x, "") for x in value])
        even = [_even(value, notes, places) for places in notes.strides]
        return (kind, *even, *map(_form, value, notes.fields))
    if kind is TensorDescriptor:
        return value.base.dtype, *value.block_shape
    return kind if kind is float else (kind, _plain(value))


def _plain(value: Any) -> Any:
    """A constant without Triton's wrapper."""
    return value.value if isinstance(value, tl.constexpr) else value


def _even(record: tuple[Any, ...], notes: _Notes, places: tuple[int, ...]) -> bool:
    """Whether the compiler is told that strides are multiples of ALIGNMENT."""
    for i in notes.units:
        if record[i] != 1:
            return False
    return all(record[i] % ALIGNMENT == 0 for i in places)


def specialised(kernel: Any, arguments: dict[str, Any]) -> Specialised:
    """What `kernel[grid](**arguments)` needs compiled."""
    found = Specialised({}, {}, {}, dict(arguments))
    for place, parameter in enumerate(kernel.params):
        value = found.options.pop(parameter.name, parameter.default)
        if parameter.is_constexpr:
            found.constants[place,] = value
            found.signature[parameter.name] = "constexpr"
        else:
            found.signature[parameter.name] = _type_of(value, (place,), "", found)
    return found


def _type_of(value: Any, path: Path, note: str, found: Specialised) -> Any:
    """Triton's type of an argument; `note` says what is worth a compilation."""
    if value is None or isinstance(value, tl.constexpr | tl.dtype):
        found.constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor):
        if value.data_ptr() % ALIGNMENT == 0:
            found.attrs[path] = _DIVISIBLE
        return mangle_type(value)
    if isinstance(value, tuple):
        return _types_of(value, path, found)
    if isinstance(value, bool) or not isinstance(value, int | float | TensorDescriptor):
        raise TypeError(f"a kernel takes no {type(value).__name__}, at {path}")
    if note == _UNIT and value == 1:
        found.constants[path] = value
        return "constexpr"
    if note == _EVEN:
        found.attrs[path] = _DIVISIBLE
    return mangle_type(value)


def _types_of(record: tuple[Any, ...], path: Path, found: Specialised) -> Any:
    """The types of a tuple's or record's members, in one of its kind."""
    kind = type(record)
    notes = _notes(kind)
    if notes is None:
        return tuple(_type_of(x, (*path, i), "", found) for i, x in enumerate(record))
    fields = list(notes.fields)
    for places in notes.strides:
        for i in places:
            fields[i] = _EVEN if _even(record, notes, places) else ""
    types = [
        _type_of(x, (*path, i), note, found)
        for i, (x, note) in enumerate(zip(record, fields, strict=True))
    ]
    return kind(*types)


@functools.cache
def _notes(record: Any) -> _Notes | None:
    """What the fields of a type of record say; None for a plain tuple."""
    if not hasattr(record, "_fields"):
        return None
    hints = get_type_hints(record, include_extras=True).values()
    fields = tuple(getattr(hint, "__metadata__", ("",))[0] for hint in hints)
    strides = [
        tuple(i for i, field in enumerate(fields) if field == group)
        for group in dict.fromkeys(fields)
        if group not in ("", _UNIT)
    ]
    units = tuple(i for i, field in enumerate(fields) if field == _UNIT)
    return _Notes(fields, units, tuple(strides))

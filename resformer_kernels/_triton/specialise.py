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
_DIVISIBLE = [["tt.divisibility", ALIGNMENT]]
Path: TypeAlias = tuple[int, ...]
"""The place of a number among nested arguments."""


class Specialised(NamedTuple):
    """A kernel and what it is compiled for, in Triton's terms."""

    kernel: Any
    signature: dict[str, Any]
    """Types by name; "constexpr" for constants."""
    constants: dict[Path, Any]
    attrs: dict[Path, list[list[Any]]]
    options: dict[str, Any]
    """Of the compiler, such as num_warps."""
    arguments: tuple[Any, ...]
    """In the kernel's order."""

    @property
    def identity(self) -> Any:
        """Equal where a compiled kernel may serve both."""
        constants = tuple((path, plain(x)) for path, x in self.constants.items())
        types, options = tuple(self.signature.values()), tuple(sorted(self.options.items()))
        return self.kernel.fn, types, constants, tuple(self.attrs), options


def plain(value: Any) -> Any:
    """A constant without Triton's wrapper."""
    return value.value if isinstance(value, tl.constexpr) else value


def specialised(kernel: Any, arguments: dict[str, Any]) -> Specialised:
    """What `kernel[grid](**arguments)` needs compiled."""
    given = dict(arguments)
    found = Specialised(kernel, {}, {}, {}, given, ())
    values = []
    for place, parameter in enumerate(kernel.params):
        value = given.pop(parameter.name) if parameter.name in given else parameter.default
        values.append(value)
        if parameter.is_constexpr:
            found.constants[place,] = value
            found.signature[parameter.name] = "constexpr"
        else:
            found.signature[parameter.name] = _type_of(value, (place,), "", found)
    return found._replace(arguments=tuple(values))


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
    notes = _notes(kind) if hasattr(kind, "_fields") else ("",) * len(record)
    groups = {note for note in notes if note not in ("", _UNIT)}
    noted = list(zip(notes, record, strict=True))
    uneven = {note for note, x in noted if note in groups and x % ALIGNMENT}
    if any(note == _UNIT and x != 1 for note, x in noted):
        uneven = groups
    types = [
        _type_of(x, (*path, i), _EVEN if note in groups - uneven else note, found)
        for i, (note, x) in enumerate(noted)
    ]
    return kind(*types) if hasattr(kind, "_fields") else tuple(types)


@functools.cache
def _notes(record: Any) -> tuple[str, ...]:
    """What each field's annotation says is worth a compilation; "" where nothing is."""
    hints = get_type_hints(record, include_extras=True).values()
    return tuple(getattr(hint, "__metadata__", ("",))[0] for hint in hints)

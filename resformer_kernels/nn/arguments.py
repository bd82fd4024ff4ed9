"""Checks of the modules' arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from resformer_kernels._core.checks import describe, real


class Array(Protocol):
    """An array or a tensor."""

    def tolist(self) -> Any:
        """Its numbers as Python's."""


Numbers = float | Sequence[float] | Array
"""A number, or several: any sequence, array or tensor of one axis."""


def listed(name: str, value: Any) -> list[Any]:
    """The elements of a sequence, array or tensor; [value] where it is none.

    Raises:
        TypeError: a tensor that requires a gradient, which it would not get.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} gets no gradient, got {describe(value)} that requires one")
    found = value.tolist() if hasattr(value, "tolist") else value
    return list(found) if isinstance(found, Sequence) and not isinstance(found, str) else [found]


def reals(name: str, value: Any, lengths: Sequence[int] = ()) -> list[float]:
    """`value`, a number or several, as finite Python floats; as many as one of `lengths` says.

    Python's and numpy's numbers and sequences of them are taken, and arrays and tensors.
    """
    numbers = [float(real(name, number)) for number in listed(name, value)]
    if lengths and len(numbers) not in lengths:
        wanted = " or ".join(str(n) for n in dict.fromkeys(lengths))
        raise ValueError(f"{name} must have {wanted} numbers, got {len(numbers)}")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"{name} must be finite, got {value}")
    return numbers


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {describe(value)}")

"""What kernels are compiled for: of the numbers in a record, what its fields say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton.language as tl

from resformer_kernels._triton.specialise import (
    Specialised,
    Stride,
    Unit,
    identity,
    specialised,
)

DIVISIBLE = [["tt.divisibility", 16]]


class Rows(NamedTuple):
    pointer: Tensor | None
    length: int
    batch: Stride
    time: Stride


class Matrix(NamedTuple):
    row: Stride
    column: Unit
    SIZE: tl.constexpr


class Kernel:
    """A kernel of one argument."""

    params = (SimpleNamespace(name="x", is_constexpr=False, default=None),)


KERNEL = Kernel()


def of(value: Any) -> Specialised:
    """Of an argument, and num_warps."""
    return specialised(KERNEL, {"x": value, "num_warps": 8})


def known_by(value: Any) -> Any:
    """What the compiled kernel is found by."""
    return identity(KERNEL, {"x": value, "num_warps": 8})


@pytest.mark.parametrize("number", [-1, 0, 1, 2, 15, 16, 4096, 2**31 - 1])
def test_a_number_is_a_number(number: int) -> None:
    found = of(number)
    assert (found.signature, found.constants, found.attrs) == ({"x": "i32"}, {}, {})
    assert found.options == {"num_warps": 8}
    assert known_by((number,)) == known_by((7,))


def test_types() -> None:
    x = torch.zeros(64)
    assert of(2**31).signature == {"x": "i64"}
    assert of(1.0).signature == {"x": "fp32"}
    assert of((x, x[1:], None)).signature == {"x": ("*fp32", "*fp32", "constexpr")}
    assert of((x, x[1:], None)).attrs == {(0, 0): DIVISIBLE}
    assert of((x, x[4:], None)).attrs == {(0, 0): DIVISIBLE, (0, 1): DIVISIBLE}
    assert of(tl.constexpr(3)).constants.keys() == {(0,)}
    for wrong in ("text", True, [1]):
        with pytest.raises(TypeError, match=f"a kernel takes no {type(wrong).__name__}"):
            of(wrong)


@pytest.mark.parametrize(
    ("batch", "time", "even"), [(32, 16, True), (0, 16, True), (32, 8, False), (1, 16, False)]
)
def test_strides_are_multiples_together_or_not_at_all(batch: int, time: int, even: bool) -> None:
    found = of(Rows(None, 16, batch, time))
    assert found.attrs == ({(0, 2): DIVISIBLE, (0, 3): DIVISIBLE} if even else {})
    assert found.signature["x"] == Rows("constexpr", "i32", "i32", "i32")  # type: ignore[arg-type]


def test_strides_count_where_the_innermost_is_one() -> None:
    size = tl.constexpr(4)
    unit, other = of(Matrix(16, 1, size)), of(Matrix(16, 32, size))
    assert unit.attrs == {(0, 0): DIVISIBLE}
    assert set(unit.constants) == {(0, 1), (0, 2)}
    assert other.attrs == {}
    assert set(other.constants) == {(0, 2)}
    assert known_by(Matrix(16, 1, size)) != known_by(Matrix(16, 32, size))
    assert known_by(Matrix(17, 1, size)) != known_by(Matrix(17, 32, size))
    assert known_by(Matrix(16, 32, size)) == known_by(Matrix(17, 48, tl.constexpr(4)))
    assert known_by(Matrix(16, 32, size)) != known_by(Matrix(16, 32, tl.constexpr(8)))


def test_all_that_is_compiled_apart_is_known_apart() -> None:
    x, wide = torch.zeros(64), torch.zeros(64, dtype=torch.float64)
    size = tl.constexpr(4)
    values: list[Any] = [
        *(None, 1, 2**31, -(2**31) - 1, 1.0, x, x[1:], wide, tl.constexpr(1), tl.constexpr(None)),
        *((x,), (x, x), (1, x), (x, 1), (1.0,), ((1,),), (None,), (tl.constexpr(1),)),
        *(Rows(None, 1, 16, 16), Rows(None, 1, 16, 1), Rows(x, 1, 16, 16), Rows(None, 1, 2**31, 1)),
        *(Matrix(16, 1, size), Matrix(17, 1, size), Matrix(16, 2, size), Matrix(1, 1, tl.float32)),
    ]
    for a in values:
        for b in values:
            compiled = of(a)[:3], of(b)[:3]
            # A kernel may be compiled twice, but none may serve what is not its own.
            assert known_by(a) != known_by(b) or repr(compiled[0]) == repr(compiled[1]), (a, b)
    assert known_by(2) == known_by(1)
    assert known_by(True) != known_by(1)

"""What is taken for a number: Python's, numpy's, and tensors and arrays of no axes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from resformer_kernels._core.checks import check_finite, integer, integers, real

INTEGERS: list[Any] = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)]
REALS: list[Any] = [
    *INTEGERS,
    3.0,
    Fraction(3),
    np.float16(3),
    np.float32(3),
    np.float64(3),
    np.array(3.0, dtype=np.float32),
    torch.tensor(3.0, dtype=torch.bfloat16),
]
NOT_NUMBERS: list[Any] = [
    True,
    np.bool_(True),
    torch.tensor(True),
    "3",
    None,
    3j,
    np.complex64(3),
    [3],
    np.array([3]),
    torch.tensor([3]),
    torch.tensor(3.0, requires_grad=True),
]


@pytest.mark.parametrize("value", REALS, ids=repr)
def test_numbers_become_pythons(value: Any) -> None:
    found = real("scale", value)
    assert found == 3
    assert type(found) in (int, float)


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers_become_pythons(value: Any) -> None:
    found = integer("count", value, least=3)
    assert found == 3
    assert type(found) is int
    with pytest.raises(ValueError, match="count must be at least 4, got 3"):
        integer("count", value, least=4)


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="scale must be a number"):
        real("scale", value)
    with pytest.raises(TypeError, match=r"count must be (an int|a number)"):
        integer("count", value)


@pytest.mark.parametrize("value", [3.0, np.float32(3), torch.tensor(3.0)], ids=repr)
def test_a_float_is_no_count(value: Any) -> None:
    with pytest.raises(TypeError, match="count must be an int"):
        integer("count", value)


@pytest.mark.parametrize(
    "values",
    [[3, 4], (np.int64(3), 4), np.array([3, 4]), torch.tensor([3, 4]), range(3, 5)],
    ids=repr,
)
def test_sequences_become_pythons(values: Any) -> None:
    found = integers("picks", values)
    assert found == [3, 4]
    assert {type(x) for x in found} == {int}


@pytest.mark.parametrize("value", [3, None, np.int64(3), np.array(3), torch.tensor(3)], ids=repr)
def test_one_number_is_no_sequence(value: Any) -> None:
    with pytest.raises(TypeError, match="picks must be a sequence of ints, got"):
        integers("picks", value)


@pytest.mark.parametrize(
    "values",
    ["34", [3, 4.0], [3, True], np.array([3.0, 4.0]), torch.tensor([[3], [4]]), {"a": 1}],
    ids=repr,
)
def test_what_is_no_sequence_of_ints_is_refused(values: Any) -> None:
    with pytest.raises(TypeError, match=r"picks\[\d\] must be an int, got"):
        integers("picks", values)


def test_what_is_not_finite_is_named_with_its_place() -> None:
    x = torch.zeros(2, 3)
    check_finite("targets", x)
    check_finite("targets", x[:0])
    check_finite("targets", x.long())
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"targets is not finite: nan at \(1, 2\)"):
        check_finite("targets", x)
    x[0, 1] = -torch.inf
    with pytest.raises(ValueError, match=r"is not finite: -inf at \(0, 1\)"):
        check_finite("targets", x)

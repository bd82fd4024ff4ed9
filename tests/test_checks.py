"""What is taken for a number: Python's, numpy's, and tensors and arrays of no axes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from resformer_kernels._core.checks import integer, real

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

"""Tests give constants only values that the package allows."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from resformer_kernels.scan.triton import partition
from tests.replaced import replaced


def test_a_constant_takes_a_value_that_its_module_allows() -> None:
    with replaced(partition, STEPS=4):
        assert partition.STEPS == 4
    partition.check_constants()


@pytest.mark.parametrize("bad", [{"STEPS": 0}, {"CHANNELS": 96}, {"LEAST_TIME": 0}], ids=str)
def test_a_value_that_kernels_cannot_have_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(AssertionError), replaced(partition, **bad):
        pass

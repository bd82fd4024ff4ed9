"""The ranks that the tests here run on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from tests.distributed import ranks


def _sum_of_ranks() -> tuple[int, Tensor]:
    x = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(x)
    return dist.get_rank(), x


def _raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("as asked")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_each_rank_answers_in_its_order(world: int) -> None:
    found = ranks.run(world, _sum_of_ranks)
    assert [rank for rank, _ in found] == list(range(world))
    assert [x.item() for _, x in found] == [sum(range(world))] * world


def test_an_error_of_a_rank_fails_the_test() -> None:
    with pytest.raises(ranks.Failed, match=r"(?s)rank 1: .*ValueError: as asked") as raised:
        ranks.run(2, _raise_on, 1)
    assert "rank 0" not in str(raised.value)
    assert len(ranks.run(2, _sum_of_ranks)) == 2

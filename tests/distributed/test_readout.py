"""Readouts whose data lies on several ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from resformer_kernels.distributed.readout import sum_readout
from resformer_kernels.nn import Ridge
from resformer_kernels.nn.arguments import Numbers
from tests.distributed import ranks

ROWS = 200
STRENGTHS: list[Numbers] = [1e-6, 1e-2, (0.1, 1.0, 10.0)]


def _data(intercept: bool) -> tuple[Tensor, Tensor]:
    """Rows in float32, with a large mean where it is fitted."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 11, generator=generator) + (1e3 if intercept else 0)
    return x, torch.randn(ROWS, 3, generator=generator) - 50 + x[:, :3]


def _shares(world: int) -> list[slice]:
    """Of unlike sizes; the second rank of three and more has none."""
    bounds = [0, ROWS // 3, ROWS // 3, *range(ROWS // 2, ROWS, 7)][:world]
    return [slice(a, b) for a, b in zip(bounds, (*bounds[1:], ROWS), strict=True)]


def _fitted(intercept: bool) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    ridge = Ridge(11, 3, STRENGTHS, fit_intercept=intercept)
    x, y = (t[_shares(world)[rank]] for t in _data(intercept))
    for rows in (slice(0, 5), slice(5, None)):
        ridge.update(x[rows], y[rows])
    assert sum_readout(ridge, dist.group.WORLD) is ridge
    ridge.solve()
    return {
        "count": ridge.count,
        "every": [(ridge.take(i).weight.clone(), ridge.bias.clone()) for i in range(3)],
    }


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_fits_the_data_of_all(world: int, intercept: bool) -> None:
    one = Ridge(11, 3, STRENGTHS, fit_intercept=intercept).update(*_data(intercept)).solve()
    found = ranks.run(world, _fitted, intercept)
    for rank in found:
        assert rank["count"] == ROWS
        for i, (weight, bias) in enumerate(rank["every"]):
            one.take(i)
            torch.testing.assert_close(weight, one.weight, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(bias, one.bias, rtol=1e-9, atol=1e-8)
            assert torch.equal(weight, found[0]["every"][i][0])
            assert torch.equal(bias, found[0]["every"][i][1])


def _others() -> dict[str, str]:
    rank = dist.get_rank()
    found = {}
    calls: dict[str, Any] = {
        "sizes": lambda: sum_readout(Ridge(4 + rank, 2), dist.group.WORLD),
        "intercept": lambda: sum_readout(Ridge(4, 2, fit_intercept=rank == 0), dist.group.WORLD),
        "type": lambda: sum_readout(torch.nn.Linear(2, 2), dist.group.WORLD),  # type: ignore[arg-type]
        "empty": lambda: sum_readout(Ridge(4, 2), dist.group.WORLD).solve(),
    }
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError, RuntimeError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    # Sums over rows without their number.
    ridge = Ridge(2, 1, 0.0, fit_intercept=False)
    ridge.update_gram(torch.eye(2) * (rank + 1), torch.ones(2, 1))
    sum_readout(ridge, dist.group.WORLD).solve()
    ((first,),) = ridge.weight[:, :1].tolist()
    found["gram"] = f"{first:.6f}"
    return found


def test_what_cannot_be_summed_is_named() -> None:
    for found in ranks.run(2, _others):
        start = "ValueError: ridge must have the same in_features, out_features and fit_intercept"
        assert found["sizes"] == f"{start} on every rank, got [(4, 2, 1), (5, 2, 1)]"
        assert found["intercept"].endswith("got [(4, 2, 1), (4, 2, 0)]")
        assert found["type"] == "TypeError: ridge must be an nn.Ridge, got Linear"
        assert found["empty"].startswith("RuntimeError: no data was seen yet")
        assert found["gram"] == "0.666667"

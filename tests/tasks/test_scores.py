"""The scores against their definitions."""

from __future__ import annotations

import pytest
import torch

from resformer_kernels.tasks import (
    accuracy,
    bootstrap_difference,
    confusion,
    mean_and_spread,
    memory_capacity,
    nmse,
    nrmse,
    sign_flip_probability,
    valid_steps,
    weighted_f1,
)


def test_nmse_is_one_for_the_mean() -> None:
    wanted = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    assert nmse(wanted.mean(0).expand_as(wanted), wanted) == pytest.approx(1.0)
    assert nrmse(wanted + 0.0, wanted) == 0.0


def test_memory_capacity_counts_recalled_columns() -> None:
    wanted = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    predicted = wanted.clone()
    predicted[:, 1] *= -2
    predicted[:, 2] = 4.0
    assert memory_capacity(predicted, wanted) == pytest.approx(2.0)


def test_valid_steps_stop_at_the_first_large_error() -> None:
    wanted = torch.tensor([[0.0], [2.0], [0.0], [2.0]])
    predicted = wanted.clone()
    assert valid_steps(predicted, wanted) == 4
    predicted[2] = torch.nan
    assert valid_steps(predicted, wanted) == 2


def test_weighted_f1_of_a_small_table() -> None:
    wanted = torch.tensor([0, 0, 0, 1, 1, 2])
    counts = confusion(torch.tensor([0, 0, 1, 1, 0, 0]), wanted, 3)
    assert counts.tolist() == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    # F1: 2*2/(3+4), 2*1/(2+2), 0; rows 3, 2, 1
    assert weighted_f1(counts) == pytest.approx((3 * 4 / 7 + 2 * 0.5) / 6)
    assert accuracy(counts) == pytest.approx(0.5)


def test_spread_of_one_value_is_zero() -> None:
    assert mean_and_spread([2.0]) == (2.0, 0.0)
    assert mean_and_spread([1.0, 3.0]) == pytest.approx((2.0, 2**0.5))


def test_bootstrap_finds_a_difference_that_is_there() -> None:
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randint(0, 2, (2, 30, 8), generator=generator)
    better = wanted.where(torch.rand(wanted.shape, generator=generator) < 0.9, 1 - wanted)
    worse = wanted.where(torch.rand(wanted.shape, generator=generator) < 0.6, 1 - wanted)
    counts = [
        torch.stack(
            [
                torch.stack([confusion(p, w, 2) for p, w in zip(ps, ws, strict=True)])
                for ps, ws in zip(found, wanted, strict=True)
            ]
        )
        for found in (worse, better)
    ]
    low, middle, high = bootstrap_difference(counts[0], counts[1], draws=200)
    assert 0.15 < low < middle < high < 0.45
    assert bootstrap_difference(counts[0], counts[0], draws=20) == (0.0, 0.0, 0.0)


def test_sign_flips_of_pairs() -> None:
    assert sign_flip_probability([1.0, 2.0, 0.5, 3.0, 1.5]) == 2 / 32
    assert sign_flip_probability([1.0, -1.0]) == 1.0
    with pytest.raises(ValueError, match="differences must be 1 to 20, got 0"):
        sign_flip_probability([])


def test_what_is_not_finite_is_named_with_its_place() -> None:
    good = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    bad = good.clone()
    bad[3, 1] = torch.inf
    for score in (nmse, nrmse, memory_capacity):
        with pytest.raises(ValueError, match=r"predicted is not finite: .*inf at \(3, 1\)"):
            score(bad, good)
    for score in (nmse, nrmse, memory_capacity, valid_steps):
        with pytest.raises(ValueError, match=r"wanted is not finite: inf at"):
            score(good, bad)
    for statistic in (mean_and_spread, sign_flip_probability):
        with pytest.raises(ValueError, match=r"is not finite: nan at \(1,\)"):
            statistic([1.0, torch.nan])
    counts = torch.eye(2).expand(2, 3, 2, 2).clone()
    counts[1, 2, 0, 0] = torch.nan
    for share in (weighted_f1, accuracy):
        with pytest.raises(ValueError, match=r"counts is not finite: .*nan at \(0, 0\)"):
            share(counts[1, 2])
    with pytest.raises(ValueError, match=r"second is not finite: nan at \(1, 2, 0"):
        bootstrap_difference(counts[:1].expand(2, -1, -1, -1), counts)


def test_scores_of_nothing_are_refused() -> None:
    nothing = torch.zeros(0, 2)
    for score in (nmse, memory_capacity, valid_steps):
        with pytest.raises(ValueError, match=r"not empty, got \(0, 2\) and \(0, 2\)"):
            score(nothing, nothing)
    with pytest.raises(ValueError, match=r"of one shape .*got \(5, 2\) and \(5,\)"):
        nmse(torch.zeros(5, 2), torch.zeros(5))
    with pytest.raises(ValueError, match="values must hold a number at least"):
        mean_and_spread([])
    for share in (weighted_f1, accuracy):
        with pytest.raises(ValueError, match="counts must hold a row at least"):
            share(torch.zeros(3, 3, dtype=torch.int64))


def test_classes_out_of_range_are_named() -> None:
    classes = torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="wanted must hold classes 0 to 1, got 2"):
        confusion(torch.zeros_like(classes), classes, 2)
    with pytest.raises(ValueError, match="predicted must hold classes 0 to 2, got -1"):
        confusion(classes - 1, classes, 3)

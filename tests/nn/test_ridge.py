"""The streamed ridge regression against the normal equations written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resformer_kernels.nn import Ridge


def data(rows: int = 200, mean: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 7, generator=generator, dtype=torch.float64) + mean
    noise = 0.1 * torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    return x, x[:, :2] * 2 - x[:, 3:5] + 5 + noise


def by_least_squares(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Rows of sqrt(ridge) below the centred data: least squares by QR, no Gram matrix."""
    centred = torch.cat((x - x.mean(0), ridge**0.5 * torch.eye(x.shape[1], dtype=x.dtype)))
    targets = torch.cat((y - y.mean(0), torch.zeros(x.shape[1], y.shape[1], dtype=y.dtype)))
    weight = torch.linalg.lstsq(centred, targets).solution.T
    return weight, y.mean(0) - weight @ x.mean(0)


@pytest.mark.parametrize("ridge", [0.0, 1e-6, 10.0])
def test_batches_give_the_least_squares_solution(ridge: float) -> None:
    x, y = data()
    readout = Ridge(7, 2, ridge)
    for part in (slice(0, 3), slice(3, 3), slice(3, 120), slice(120, 200)):
        readout.update(x[part], y[part])
    readout.solve()
    weight, bias = by_least_squares(x, y, ridge)
    torch.testing.assert_close(readout.weight, weight, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(readout.bias, bias, atol=1e-9, rtol=1e-8)
    torch.testing.assert_close(readout(x), x @ weight.T + bias)
    assert readout.count == 200


def test_gram_pairs_and_batches_mix() -> None:
    x, y = data()
    readout = Ridge(7, 2, 0.5)
    a, b = x[:80], y[:80]
    readout.update_gram(a.T @ a, a.T @ b, count=80, x_sum=a.sum(0), y_sum=b.sum(0))
    readout.update(x[80:].view(2, 60, 7), y[80:].view(2, 60, 2)).solve()
    weight, bias = by_least_squares(x, y, 0.5)
    torch.testing.assert_close(readout.weight, weight)
    torch.testing.assert_close(readout.bias, bias)


def test_without_intercept_sums_are_enough() -> None:
    x, y = data()
    readout = Ridge(7, 2, 0.1, fit_intercept=False).update_gram(x.T @ x, x.T @ y).solve()
    expected = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(7), x.T @ y).T
    torch.testing.assert_close(readout.weight, expected)
    assert not readout.bias.any()
    torch.testing.assert_close(Ridge(7, 2, 0.1, fit_intercept=False).fit(x, y).weight, expected)


def test_a_large_mean_costs_no_digits() -> None:
    x, y = data(mean=1e6)
    readout = Ridge(7, 2, 1e-3)
    for part in range(0, 200, 50):
        readout.update(x[part : part + 50], y[part : part + 50])
    torch.testing.assert_close(
        readout.solve().weight, by_least_squares(x, y, 1e-3)[0], atol=1e-7, rtol=1e-6
    )


def test_several_strengths_are_fitted_in_one_pass_and_the_best_is_selected() -> None:
    x, y = data()
    readout = Ridge(7, 2, (1e4, 1e-3, 1e8)).fit(x[:100], y[:100])
    assert readout.strength == 1e4
    errors = readout.errors(x[100:], y[100:])
    assert errors.shape == (3,)
    readout.select(x[100:], y[100:])
    assert readout.strength == 1e-3
    torch.testing.assert_close((readout(x[100:]) - y[100:]).square().mean(), errors[1])


def test_weights_travel_by_state_dict_and_dtypes_are_kept() -> None:
    x, y = data()
    readout = Ridge(7, 2).fit(x.float(), y.float())
    other = Ridge(7, 2)
    other.load_state_dict(readout.state_dict())
    assert torch.equal(other(x), readout(x))
    assert readout(x.float()).dtype == torch.float32
    assert readout.weight.dtype == torch.float64
    x.requires_grad_()
    readout(x).sum().backward()
    torch.testing.assert_close(x.grad, readout.weight.sum(0).expand(200, 7))


def test_too_few_rows_raise_unless_regularised() -> None:
    x, y = data(4)
    with pytest.raises(RuntimeError, match=r"4 rows is not positive definite at ridge 0\.0"):
        Ridge(7, 2, 0.0, fit_intercept=False).fit(x * 0, y)
    Ridge(7, 2, 1.0).fit(x, y)


def test_errors_name_the_argument() -> None:
    x, y = data(5)
    with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
        Ridge(0, 1)
    with pytest.raises(ValueError, match="ridge must be one or more finite"):
        Ridge(1, 1, ())
    with pytest.raises(ValueError, match="ridge must be one or more finite"):
        Ridge(1, 1, -1.0)
    with pytest.raises(TypeError, match="ridge must be a number"):
        Ridge(1, 1, ("a",))  # type: ignore[arg-type]
    readout = Ridge(7, 2)
    with pytest.raises(RuntimeError, match="nothing is fitted yet"):
        readout.take(0)
    with pytest.raises(RuntimeError, match="nothing is fitted yet"):
        readout.errors(x, y)
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 7\)"):
        readout.update(y, y)
    with pytest.raises(TypeError, match="y must be a floating-point tensor"):
        readout.update(x, [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same leading axes"):
        readout.update(x[:3], y)
    with pytest.raises(ValueError, match="count, x_sum and y_sum must be given"):
        readout.update_gram(x.T @ x, x.T @ y)
    with pytest.raises(ValueError, match=r"cross must be a tensor of shape \(7, 2\)"):
        Ridge(7, 2, fit_intercept=False).update_gram(x.T @ x, y)


@pytest.mark.parametrize(
    "ridge",
    [
        np.logspace(-3, -1, 3),
        torch.logspace(-3, -1, 3, dtype=torch.float64),
        [np.float64(1e-3), 1e-2, torch.tensor(1e-1, dtype=torch.float64)],
        (1e-3, 1e-2, 1e-1),
    ],
)
def test_strengths_are_any_numbers(ridge: Any) -> None:
    readout = Ridge(np.int64(7), np.int64(2), ridge)
    assert readout.strengths == pytest.approx((1e-3, 1e-2, 1e-1))
    x, y = data()
    assert readout.fit(x, y).take(np.int64(2)).strength == pytest.approx(0.1)
    assert Ridge(7, 2, np.float32(0.5)).strengths == (0.5,)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused_before_anything_is_lost(bad: float) -> None:
    x, y = data()
    readout = Ridge(7, 2, 1e-3).fit(x, y)
    weight, wrong_x, wrong_y = readout.weight.clone(), x.clone(), y.clone()
    wrong_x[5, 3] = wrong_y[9, 1] = bad
    says = rf"x is not finite: {bad} at \(5, 3\)", rf"y is not finite: {bad} at \(9, 1\)"
    for attempt in (readout.update, readout.fit, readout.errors, readout.select):
        with pytest.raises(ValueError, match=says[0]):
            attempt(wrong_x, y)
        with pytest.raises(ValueError, match=says[1]):
            attempt(x, wrong_y)
    with pytest.raises(ValueError, match=r"x is not finite: .* at \(0, 5, 3\)"):
        readout.update(wrong_x.view(2, 100, 7).half(), y.view(2, 100, 2))
    names = ("gram", "cross", "x_sum", "y_sum")
    sums: dict[str, Any] = dict(zip(names, (x.T @ x, x.T @ y, x.sum(0), y.sum(0)), strict=True))
    for name in names:
        wrong = sums[name].clone()
        wrong.view(-1)[-1] = bad
        with pytest.raises(ValueError, match=rf"{name} is not finite: {bad} at"):
            readout.update_gram(**(sums | {name: wrong}), count=200)
    assert readout.count == 200
    assert torch.equal(readout.solve().weight, weight)


def test_products_beyond_float64_are_refused() -> None:
    x, y = data()
    readout = Ridge(7, 2).fit(x, y)
    weight = readout.weight.clone()
    with pytest.raises(ValueError, match="x or y is too large: its products are not finite"):
        readout.update(x * 1e200, y)
    assert torch.equal(readout.solve().weight, weight)


def test_a_fit_that_fails_keeps_the_data_before_it() -> None:
    x, y = data()
    readout = Ridge(7, 2, 0.0, fit_intercept=False).fit(x, y)
    with pytest.raises(RuntimeError, match="not positive definite"):
        readout.fit(x * 0, y)
    assert readout.count == 200
    assert torch.equal(readout.solve().weight, readout.fit(x, y).weight)
    with pytest.raises(RuntimeError, match="no data was seen yet"):
        Ridge(7, 2).solve()
    with pytest.raises(ValueError, match="x must hold at least one row"):
        readout.select(x[:0], y[:0])
    with pytest.raises(ValueError, match=r"index must lie in \[0, 0\], got 1"):
        readout.take(1)


def test_every_target_has_a_strength_of_its_own() -> None:
    x, y = data()
    each = (1e-3, 50.0)
    readout = Ridge(7, 2, (0.5, each, (10.0, 1e-3))).fit(x, y)
    assert readout.strengths == (0.5, each, (10.0, 1e-3))
    assert readout.strength == 0.5
    alone = [Ridge(7, 1, strength).fit(x, y[:, j : j + 1]) for j, strength in enumerate(each)]
    assert readout.take(1).strength == each
    for j, expected in enumerate(alone):
        torch.testing.assert_close(readout.weight[j], expected.weight[0])
        torch.testing.assert_close(readout.bias[j], expected.bias[0])
    # Strengths of several targets in arrays; a row of one number is for all.
    for given in (np.array([each]), torch.tensor([each], dtype=torch.float64), [list(each)]):
        assert torch.equal(Ridge(7, 2, given).fit(x, y).weight, readout.weight)
    assert Ridge(7, 2, [[0.5], each]).strengths == (0.5, each)
    with pytest.raises(ValueError, match="ridge must have 1 or 2 numbers, got 3"):
        Ridge(7, 2, ((1.0, 2.0, 3.0),))
    with pytest.raises(ValueError, match="ridge must be one or more finite"):
        Ridge(7, 2, ((1.0, -2.0),))
    with pytest.raises(RuntimeError, match=r"not positive definite at ridge 0\.0"):
        Ridge(7, 2, ((1.0, 0.0),), fit_intercept=False).fit(x * 0, y)


def test_each_target_selects_its_strength() -> None:
    x, y = data()
    # Noise on the first target, none on the second.
    noisy = torch.cat((y[:, :1] + 20 * data(200, 0.0)[0][:, :1].flip(0), y[:, 1:]), 1)
    readout = Ridge(7, 2, (1e4, 10.0, 1e-6)).fit(x[:30], noisy[:30])
    errors = readout.errors(x[100:], y[100:], per_target=True)
    assert errors.shape == (3, 2)
    torch.testing.assert_close(errors.mean(1), readout.errors(x[100:], y[100:]))
    readout.select(x[100:], y[100:], per_target=True)
    best = errors.argmin(0).tolist()
    assert best[0] != best[1]
    assert readout.strength == tuple(readout.strengths[i] for i in best)
    found = (readout(x[100:]) - y[100:]).square().mean(0)
    torch.testing.assert_close(found, errors.amin(0))
    # By place, too, from strengths of every form.
    mixed = Ridge(7, 2, (1e4, (10.0, 3.0), 1e-6)).fit(x, y)
    for index in ([1, 0], (1, 0), np.array([1, 0]), torch.tensor([1, 0])):
        mixed.take(index)
        assert mixed.strength == (10.0, 1e4)
    torch.testing.assert_close(mixed.weight[0], mixed.take(1).weight[0])
    for wrong, error, message in (
        ([0], ValueError, "index must have 2 numbers, got 1"),
        ([0, 3], ValueError, r"index must lie in \[0, 2\], got 3"),
        (-1, ValueError, r"index must lie in \[0, 2\], got -1"),
        ([0, 0.5], TypeError, "index must be an int"),
    ):
        with pytest.raises(error, match=message):
            mixed.take(wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="per_target must be True or False"):
        mixed.select(x, y, per_target=1)  # type: ignore[arg-type]

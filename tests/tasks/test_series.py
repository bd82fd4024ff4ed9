"""The series satisfy their equations, and the integrations converge at their order."""

from __future__ import annotations

import pytest
import torch

from resformer_kernels.tasks import delays, lorenz, mackey_glass, narma10


def test_narma10_follows_its_recurrence() -> None:
    u, y = narma10(200, seed=3)
    for t in (30, 150):
        before = y[t - 10 : t].flip(0)
        expected = 0.3 * before[0] + 0.05 * before[0] * before.sum() + 1.5 * u[t - 9] * u[t] + 0.1
        torch.testing.assert_close(y[t], expected)
    assert u.shape == y.shape == (200, 1)
    assert u.min() >= 0
    assert u.max() <= 0.5
    assert torch.equal(narma10(200, seed=3)[1], y)
    assert not torch.equal(narma10(200, seed=4)[1], y)


def test_mackey_glass_converges_at_fourth_order() -> None:
    coarse, middle, fine = (mackey_glass(60, substeps=n, transient=0) for n in (5, 10, 20))
    first, second = (coarse - middle).abs().max(), (middle - fine).abs().max()
    assert second < 1e-6
    assert 10 < first / second < 25
    long = mackey_glass(3000)
    assert long.shape == (3000, 1)
    assert 0.2 < long.min() < 0.5
    assert 1.2 < long.max() < 1.4


def test_lorenz_converges_at_fourth_order_and_follows_its_equations() -> None:
    coarse, middle, fine = (lorenz(100, substeps=n, transient=0) for n in (5, 10, 20))
    first, second = (coarse - middle).abs().max(), (middle - fine).abs().max()
    assert second < 1e-5
    assert 10 < first / second < 25
    x = lorenz(3000)
    assert x.shape == (3000, 3)
    slopes = torch.stack(
        (
            10 * (x[:, 1] - x[:, 0]),
            x[:, 0] * (28 - x[:, 2]) - x[:, 1],
            x[:, 0] * x[:, 1] - 8 / 3 * x[:, 2],
        ),
        1,
    )
    # Simpson's rule over two samples of 0.02.
    predicted = x[:-2] + 0.02 / 3 * (slopes[:-2] + 4 * slopes[1:-1] + slopes[2:])
    assert (predicted - x[2:]).abs().max() < 0.02


def test_delays_are_the_past() -> None:
    u, past = delays(50, 7)
    assert past.shape == (50, 7)
    for k in range(7):
        torch.testing.assert_close(past[k + 1 :, k], u[: 49 - k, 0])
    assert u.abs().max() <= 1


@pytest.mark.parametrize("function", [narma10, mackey_glass, lorenz])
def test_length_is_checked(function: object) -> None:
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        function(0)  # type: ignore[operator]


def test_tau_is_checked() -> None:
    with pytest.raises(ValueError, match="tau must be a multiple"):
        mackey_glass(5, tau=0.15)

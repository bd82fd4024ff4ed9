"""Recursive least squares against its textbook recursion, and against fits of all rows at once."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels.nn import RLS, Reservoir, Ridge
from resformer_kernels.tasks import lorenz
from tests.nn.loops import draw


def data(rows: int = 200, mean: float = 3.0) -> tuple[Tensor, Tensor]:
    x = draw(rows, 7) + mean
    return x, x[:, :2] * 2 - x[:, 3:5] + 5 + 0.1 * draw(rows, 2, seed=1)


def textbook(x: Tensor, y: Tensor, forgetting: float, alpha: float) -> tuple[Tensor, Tensor]:
    """(W, P) after a rank-one update for every row, without an intercept."""
    p = torch.eye(x.shape[1], dtype=x.dtype) / alpha
    w = torch.zeros(y.shape[1], x.shape[1], dtype=x.dtype)
    for row, target in zip(x, y, strict=True):
        gain = p @ row / (forgetting + row @ p @ row)
        w = w + torch.outer(target - w @ row, gain)
        p = (p - torch.outer(gain, row @ p)) / forgetting
    return w, p


def weighted_fit(
    x: Tensor, y: Tensor, forgetting: float, alpha: float, intercept: bool
) -> tuple[Tensor, Tensor]:
    """(W, b) by QR on weighted rows, with rows of sqrt(λ^t α) below that do not penalise b."""
    roots = forgetting ** (torch.arange(len(x) - 1, -1, -1, dtype=x.dtype) / 2)
    ones = torch.ones(len(x), 1 if intercept else 0, dtype=x.dtype)
    columns = torch.cat((x, ones), 1) * roots[:, None]
    penalty = math.sqrt(alpha) * forgetting ** (len(x) / 2)
    below = penalty * torch.eye(x.shape[1], columns.shape[1], dtype=x.dtype)
    wanted = torch.cat((y * roots[:, None], y.new_zeros(x.shape[1], y.shape[1])))
    found = torch.linalg.lstsq(torch.cat((columns, below)), wanted).solution.T
    bias = found[:, -1] if intercept else torch.zeros_like(found[:, 0])
    return found[:, : x.shape[1]], bias


def learned(x: Tensor, y: Tensor, rows: int, **options: Any) -> RLS:
    readout = RLS(x.shape[1], y.shape[1], **options)
    for a, b in zip(x.split(rows), y.split(rows), strict=True):
        assert readout.update(a, b) is readout
    return readout


@pytest.mark.parametrize("forgetting", [1.0, 0.95])
@pytest.mark.parametrize("rows", [1, 3, 64, 200])
def test_updates_are_the_textbook_recursion(forgetting: float, rows: int) -> None:
    x, y = data()
    readout = learned(x, y, rows, forgetting=forgetting, alpha=0.1, fit_intercept=False)
    weight, inverse = textbook(x, y, forgetting, 0.1)
    torch.testing.assert_close(readout.weight, weight)
    torch.testing.assert_close(readout.inverse, inverse, atol=1e-8, rtol=1e-6)
    assert not readout.bias.any()


@pytest.mark.parametrize("forgetting", [1.0, 0.999, 0.9])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("rows", [1, 10, 4096])
def test_after_every_update_it_is_the_fit_of_all_rows(
    forgetting: float, intercept: bool, rows: int
) -> None:
    x, y = data(60)
    options: dict[str, Any] = {"forgetting": forgetting, "alpha": 1e-3}
    options["fit_intercept"] = intercept
    readout = RLS(7, 2, **options)
    for end in range(rows, 61, rows) if rows < 60 else (60,):
        readout.update(x[max(end - rows, 0) : end], y[max(end - rows, 0) : end])
        weight, bias = weighted_fit(x[:end], y[:end], forgetting, 1e-3, intercept)
        torch.testing.assert_close(readout.weight, weight, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(readout.bias, bias, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(readout(x), x @ weight.T + bias, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("units", [7, 90])
@pytest.mark.parametrize("rows", [1, 8, 1000])
@pytest.mark.parametrize("intercept", [True, False])
def test_without_forgetting_it_is_ridge(units: int, rows: int, intercept: bool) -> None:
    x, y = draw(150, units) + 2, draw(150, 2, seed=1)
    expected = Ridge(units, 2, 0.1, fit_intercept=intercept).fit(x, y)
    readout = learned(x, y, rows, alpha=0.1, fit_intercept=intercept)
    torch.testing.assert_close(readout.weight, expected.weight, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(readout.bias, expected.bias, atol=1e-8, rtol=1e-7)


def test_rows_of_any_leading_axes_are_taken() -> None:
    x, y = data()
    expected = learned(x, y, 200)
    found = RLS(7, 2).update(x[:0], y[:0]).update(x.view(4, 50, 7), y.view(4, 50, 2))
    torch.testing.assert_close(found.weight, expected.weight)
    single = RLS(7, 2)
    for a, b in zip(x.float(), y.float(), strict=True):
        single.update(a, b)
    torch.testing.assert_close(single.weight, expected.weight, atol=1e-4, rtol=1e-4)
    assert single(x.bfloat16()).dtype == torch.bfloat16


@pytest.fixture(scope="module")
def chaotic() -> tuple[Tensor, Tensor]:
    """States whose covariance float64 can hardly invert, and targets: an inverse that is only ever
    updated by them ceases to be positive definite."""
    x = lorenz(100_301, step=0.02, seed=0)
    x = (x - x.mean(0)) / x.std()
    options: dict[str, Any] = {"sr": 0.6, "input_scaling": 0.2, "bias_scaling": 1.0}
    reservoir = Reservoir(60, 3, input_connectivity=1.0, **options)
    states, _ = reservoir(x[None, :-1].float())
    assert isinstance(states, Tensor)
    return states[0, 200:].double(), x[201:]


@pytest.mark.parametrize("forgetting", [1.0, 0.999])
def test_it_is_stable_over_many_rows(forgetting: float, chaotic: tuple[Tensor, Tensor]) -> None:
    h, y = chaotic
    readout = learned(h[:100_000], y[:100_000], 11, forgetting=forgetting)
    skew = (readout.inverse - readout.inverse.T).abs().max()
    assert skew <= 1e-9 * readout.inverse.abs().max()
    weights = forgetting ** torch.arange(99_999, -1, -1, dtype=torch.float64)
    rows = (h[:100_000] - readout.means[:60]) * weights.sqrt()[:, None]
    torch.testing.assert_close(readout.products[:, :60], rows.T @ rows, atol=1e-6, rtol=1e-9)
    # It is the solution of its own sums, up to what collected since they were factored.
    gram = readout.products[:, :60].clone()
    floor = 4 * 60 * 2**-52 * float(gram.diagonal().max())
    gram.diagonal().add_(max(float(readout.penalty), floor))
    solution = torch.cholesky_solve(readout.products[:, 60:], torch.linalg.cholesky(gram)).T
    assert (readout.weight - solution).norm() < 0.05 * solution.norm()
    if forgetting == 1:
        expected = Ridge(60, 3).fit(h[:100_000], y[:100_000])
    else:  # the fit of the rows that are not forgotten
        expected = Ridge(60, 3, 1e-9).fit(h[95_000:100_000], y[95_000:100_000])
    near = slice(99_900, 100_000) if forgetting < 1 else slice(100_000, None)

    def error(by: RLS | Ridge) -> Tensor:
        return (by(h[near]) - y[near]).square().mean()

    assert error(readout) < 1.05 * error(expected)


def test_inputs_that_hardly_vary_are_learned_from() -> None:
    generator = torch.Generator().manual_seed(0)
    for units in (5, 100):
        for scale in (1e-8, 1.0, 1e6):
            x = scale * torch.randn(1, units, generator=generator, dtype=torch.float64)
            x = x * (1 + 0.01 * torch.randn(300, 1, generator=generator, dtype=torch.float64))
            for forgetting in (1.0, 0.9):
                readout = learned(x, 3 * x[:, :2] / scale, 7, forgetting=forgetting)
                assert readout.weight.isfinite().all()
                if scale == 1.0:
                    torch.testing.assert_close(readout(x), 3 * x[:, :2], atol=1e-4, rtol=1e-4)
    # All that came before is forgotten, the penalty too.
    readout = learned(*data(), 7, forgetting=0.5)
    readout.update(torch.ones(3000, 7), torch.ones(3000, 2))
    torch.testing.assert_close(readout(torch.ones(7)), torch.ones(2))
    assert not readout.penalty


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda readout: pickle.loads(pickle.dumps(readout)),
    "cast": lambda readout: copy.deepcopy(readout).to(torch.bfloat16).float(),
    "load": lambda readout: loaded(RLS(7, 2, forgetting=0.9), readout),
}


def loaded(empty: RLS, readout: RLS) -> RLS:
    empty.load_state_dict(readout.state_dict())
    return empty


@pytest.mark.parametrize("how", COPIES)
def test_copies_learn_on(how: str) -> None:
    x, y = data()
    readout = learned(x[:100], y[:100], 3, forgetting=0.9)
    copied = COPIES[how](readout)
    assert all(buffer.dtype == torch.float64 for buffer in copied.buffers())
    for each in (readout, copied):
        each.update(x[100:], y[100:])
    for found, expected in zip(copied.buffers(), readout.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    # Each learns on its own.
    before = readout.weight.clone()
    copied.update(x, y)
    assert torch.equal(readout.weight, before)
    assert copied.reset() is None
    assert not copied.weight.any()
    for found, expected in zip(copied.buffers(), RLS(7, 2).buffers(), strict=True):
        assert torch.equal(found, expected)


def test_it_is_made_on_the_meta_device_and_in_any_default_dtype() -> None:
    x, y = data()
    readout = learned(x, y, 50)
    with torch.device("meta"):
        empty = RLS(7, 2)
    empty.load_state_dict(readout.state_dict(), assign=True)
    assert torch.equal(empty(x), readout(x))
    with torch.device("meta"):
        empty = RLS(7, 2)
    assert torch.equal(loaded(empty.to_empty(device="cpu"), readout)(x), readout(x))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(learned(x, y, 50).weight, readout.weight)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_inference_mode_made_is_trained_after() -> None:
    x, y = data()
    readout = RLS(7, 2)
    with torch.inference_mode():
        readout.update(x[:100] + 0, y[:100] + 0)
        readout.reset()
        readout.update(x[:100] + 0, y[:100] + 0)
    readout.update(x[100:], y[100:])
    z = x.clone().requires_grad_()
    readout(z).sum().backward()
    torch.testing.assert_close(z.grad, readout.weight.sum(0).expand(200, 7))
    assert not readout.update(z, y).weight.requires_grad


def test_errors_name_the_argument_and_change_nothing() -> None:
    for options, error, message in (
        ({"forgetting": 0.0}, ValueError, r"forgetting must lie in \(0, 1\], got 0\.0"),
        ({"forgetting": 1.5}, ValueError, "forgetting must lie in"),
        ({"forgetting": "1"}, TypeError, "forgetting must be a number"),
        ({"alpha": 0.0}, ValueError, "alpha must be a positive finite number"),
        ({"alpha": math.inf}, ValueError, "alpha must be a positive finite number"),
        ({"fit_intercept": 1}, TypeError, "fit_intercept must be True or False"),
    ):
        with pytest.raises(error, match=message):
            RLS(7, 2, **options)
    with pytest.raises(ValueError, match="in_features must be at least 1"):
        RLS(0, 2)
    x, y = data()
    readout = learned(x, y, 100)
    before = [buffer.clone() for buffer in readout.buffers()]
    holed = x.clone()
    holed[150, 3] = torch.nan
    for a, b, error, message in (
        (holed, y, ValueError, r"x is not finite: nan at \(150, 3\)"),
        (x, y * torch.inf, ValueError, "y is not finite"),
        (x[:3], y, ValueError, "same leading axes"),
        (x.long(), y, TypeError, "x must be a floating-point tensor"),
        (y, y, ValueError, r"x must be \(\.\.\., 7\)"),
        (x * 1e200, y, ValueError, "too large"),
        (x * 1e150, y * 1e300, ValueError, "too large"),
    ):
        with pytest.raises(error, match=message):
            readout.update(a, b)
    assert all(torch.equal(a, b) for a, b in zip(readout.buffers(), before, strict=True))
    assert str(readout) == "RLS(7, 2, forgetting=1.0, alpha=1e-06)"


def test_it_learns_as_reservoirpy_does() -> None:
    nodes = pytest.importorskip("reservoirpy.nodes")
    x, y = data()
    for forgetting in (1.0, 0.97):
        node = nodes.RLS(alpha=0.1, forgetting=forgetting, fit_bias=False)
        node.partial_fit(x.numpy(), y.numpy())
        readout = learned(x, y, 9, alpha=0.1, forgetting=forgetting, fit_intercept=False)
        torch.testing.assert_close(readout.weight, torch.from_numpy(node.Wout.T.copy()))

"""Scores of predictions: series are (time, channels), classes are integers (rows,).

A NaN or an infinity raises ValueError that says where it is, and so do scores of nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_finite, integer, real


def _check_series(predicted: Tensor, wanted: Tensor) -> None:
    if predicted.shape != wanted.shape or wanted.dim() != 2 or not wanted.numel():
        raise ValueError(
            "predicted and wanted must be of one shape (time, channels), and not empty, got "
            f"{tuple(predicted.shape)} and {tuple(wanted.shape)}"
        )
    check_finite("wanted", wanted)


def _numbers(name: str, values: Sequence[float]) -> Tensor:
    found = [real(f"{name}[{i}]", value) for i, value in enumerate(values)]
    numbers = torch.tensor(found, dtype=torch.float64)
    check_finite(name, numbers)
    return numbers


def nmse(predicted: Tensor, wanted: Tensor) -> float:
    """The mean squared error over the variance of `wanted`, both (T, m)."""
    _check_series(predicted, wanted)
    check_finite("predicted", predicted)
    error = (predicted - wanted).double().square().mean()
    return float(error / (wanted.double() - wanted.double().mean(0)).square().mean())


def nrmse(predicted: Tensor, wanted: Tensor) -> float:
    """The square root of `nmse`."""
    return nmse(predicted, wanted) ** 0.5


def memory_capacity(predicted: Tensor, wanted: Tensor) -> float:
    """Σ over columns of the squared correlation of prediction and target (Jaeger, 2001)."""
    _check_series(predicted, wanted)
    check_finite("predicted", predicted)
    a, b = (t.double() - t.double().mean(0) for t in (predicted, wanted))
    power = a.square().sum(0) * b.square().sum(0)
    return float(((a * b).sum(0).square() / power.clamp_min(1e-300)).sum())


def valid_steps(predicted: Tensor, wanted: Tensor, *, threshold: float = 0.4) -> int:
    """Steps until the error |p - w| first exceeds `threshold` times the spread of `wanted`.

    The spread is the square root of the mean squared distance from the mean, over all channels.
    A prediction that is not finite, as of a model that runs away, exceeds it.
    """
    _check_series(predicted, wanted)
    threshold = real("threshold", threshold)
    spread = (wanted - wanted.mean(0)).double().square().sum(1).mean().sqrt()
    error = (predicted - wanted).double().square().sum(1).sqrt() / spread
    beyond = torch.nonzero(~(error <= threshold))
    return int(beyond[0]) if len(beyond) else len(error)


def confusion(predicted: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes): rows are true classes, columns predicted ones.

    Classes are 0 to classes - 1; ValueError for others.
    """
    classes = integer("classes", classes, 1)
    for name, found in (("predicted", predicted), ("wanted", wanted)):
        outside = (found < 0) | (found >= classes)
        if bool(outside.any()):
            raise ValueError(
                f"{name} must hold classes 0 to {classes - 1}, got {found[outside][0].item()}"
            )
    return torch.bincount(wanted * classes + predicted, minlength=classes**2).view(classes, -1)


def weighted_f1(counts: Tensor) -> float:
    """The mean of the classes' F1, weighted by true rows; counts as `confusion` returns them."""
    counts = _counts(counts)
    hits, rows, columns = counts.diagonal(), counts.sum(1), counts.sum(0)
    f1 = 2 * hits / (rows + columns).clamp_min(1)
    return float((f1 * rows).sum() / rows.sum())


def accuracy(counts: Tensor) -> float:
    """The fraction of rows on the diagonal; counts as `confusion` returns them."""
    counts = _counts(counts)
    return float(counts.diagonal().sum() / counts.sum())


def _counts(counts: Tensor) -> Tensor:
    check_finite("counts", counts)
    if not counts.sum() > 0:
        raise ValueError("counts must hold a row at least, got none")
    return counts.double()


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (0 for a single value)."""
    found = _numbers("values", values)
    if not len(found):
        raise ValueError("values must hold a number at least, got none")
    return float(found.mean()), float(found.std()) if len(found) > 1 else 0.0


def sign_flip_probability(differences: Sequence[float]) -> float:
    """p-value of an exact two-sided sign-flip test: the fraction of all sign choices whose mean
    difference is at least as large.

    Args:
        differences: one per pair, such as a seed; 1 to 20.

    Raises:
        ValueError: no difference, or more than 20.
    """
    if not 1 <= len(differences) <= 20:
        raise ValueError(f"differences must be 1 to 20, got {len(differences)}")
    found = _numbers("differences", differences)
    sums = torch.zeros(1, dtype=torch.float64)
    for value in found:
        sums = torch.cat((sums + value, sums - value))
    # The factor admits sums that differ by rounding alone.
    return float((sums.abs() >= found.sum().abs() * (1 - 1e-9)).double().mean())


def bootstrap_difference(
    first: Tensor, second: Tensor, *, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Bootstrap of the second model's weighted F1 minus the first's: 2.5% quantile, value, 97.5%.

    Each draw resamples all conversations with replacement, the same for both models; a model's
    seeds are averaged.

    Args:
        first, second: counts of `confusion`, (seeds, conversations, classes, classes).
        draws: number of resampled sets of conversations.
        seed: seeds the draws.
    """
    draws, conversations = integer("draws", draws, 1), first.shape[1]
    check_finite("first", first)
    check_finite("second", second)
    generator = torch.Generator().manual_seed(integer("seed", seed))
    drawn = torch.randint(0, conversations, (draws, conversations), generator=generator)
    weights = torch.zeros(draws, conversations, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(weights))
    all_once = torch.ones(1, conversations, dtype=torch.float64)
    weights = torch.cat((all_once, weights))

    def score(counts: Tensor) -> Tensor:
        sums = torch.einsum("dn,sncp->dscp", weights, counts.double())
        return torch.tensor([[weighted_f1(c) for c in seeds] for seeds in sums]).mean(1)

    found = score(second) - score(first)
    low, high = torch.quantile(found[1:], found.new_tensor([0.025, 0.975])).tolist()
    return low, float(found[0]), high

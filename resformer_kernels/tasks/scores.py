"""Scores of predictions: series are (time, channels), classes are integers (rows,)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def nmse(predicted: Tensor, wanted: Tensor) -> float:
    """The mean squared error over the variance of `wanted`, both (T, m)."""
    error = (predicted - wanted).double().square().mean()
    return float(error / (wanted.double() - wanted.double().mean(0)).square().mean())


def nrmse(predicted: Tensor, wanted: Tensor) -> float:
    """The square root of `nmse`."""
    return nmse(predicted, wanted) ** 0.5


def memory_capacity(predicted: Tensor, wanted: Tensor) -> float:
    """Σ over columns of the squared correlation of prediction and target (Jaeger, 2001)."""
    a, b = (t.double() - t.double().mean(0) for t in (predicted, wanted))
    power = a.square().sum(0) * b.square().sum(0)
    return float(((a * b).sum(0).square() / power.clamp_min(1e-300)).sum())


def valid_steps(predicted: Tensor, wanted: Tensor, *, threshold: float = 0.4) -> int:
    """Steps until the error |p - w| first exceeds `threshold` times the spread of `wanted`.

    The spread is the square root of the mean squared distance from the mean, over all channels.
    """
    spread = (wanted - wanted.mean(0)).double().square().sum(1).mean().sqrt()
    error = (predicted - wanted).double().square().sum(1).sqrt() / spread
    beyond = torch.nonzero(~(error <= threshold))
    return int(beyond[0]) if len(beyond) else len(error)


def confusion(predicted: Tensor, wanted: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes): rows are true classes, columns predicted ones."""
    return torch.bincount(wanted * classes + predicted, minlength=classes**2).view(classes, -1)


def weighted_f1(counts: Tensor) -> float:
    """The mean of the classes' F1, weighted by true rows; counts as `confusion` returns them."""
    counts = counts.double()
    hits, rows, columns = counts.diagonal(), counts.sum(1), counts.sum(0)
    f1 = 2 * hits / (rows + columns).clamp_min(1)
    return float((f1 * rows).sum() / rows.sum())


def accuracy(counts: Tensor) -> float:
    """The fraction of rows on the diagonal; counts as `confusion` returns them."""
    return float(counts.diagonal().sum() / counts.sum())


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (0 for a single value)."""
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) if len(values) > 1 else 0.0


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
    found = torch.tensor(differences, dtype=torch.float64)
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
    conversations = first.shape[1]
    generator = torch.Generator().manual_seed(seed)
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

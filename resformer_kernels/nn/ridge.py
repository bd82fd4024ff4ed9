"""Ridge regression in one pass over the data: Cholesky on a streamed Gram matrix in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resformer_kernels._core.checks import check_finite, check_flag, describe, integer
from resformer_kernels.nn.arguments import Array, Numbers, listed, reals
from resformer_kernels.nn.readout import LinearReadout

Strength = float | tuple[float, ...]
"""Of all targets, or of each."""


class RidgeSums(NamedTuple):
    """What a fit needs of the data, in float64: products of the centred rows, and means (zeros
    without an intercept)."""

    gram: Tensor
    """(N, N)."""
    cross: Tensor
    """(N, m)."""
    x_mean: Tensor
    y_mean: Tensor

    def about(self, count: int, x_mean: Tensor, y_mean: Tensor) -> RidgeSums:
        """The same for `count` rows that are centred at other means."""
        dx, dy = self.x_mean - x_mean, self.y_mean - y_mean
        gram = self.gram + count * torch.outer(dx, dx)
        cross = self.cross + count * torch.outer(dx, dy)
        return RidgeSums(gram, cross, x_mean, y_mean)


class Ridge(LinearReadout):
    """A linear readout y = W x + b, W = argmin Σ |y - W x - b|² + ridge |W|²; b is not penalised.

    Data comes in batches (`update`) or as pairs (XᵀX, XᵀY) such as `reservoir_scan(reduce="gram")`
    returns (`update_gram`), in any order, and is not stored. Means and centred products are merged
    batch by batch (Chan, Golub and LeVeque, 1983), so a large mean costs no precision. `solve` then
    factors one float64 matrix per strength; the data is read once for all of them.

    The sums and solutions stay float64, and move and copy with the module; checkpoints hold weight
    and bias alone. What is not finite is refused before anything is added to the sums.

    Args:
        in_features: N, the length of x.
        out_features: m, the length of y.
        ridge: the strength, added to the diagonal of the sum XᵀX (not of its mean), as in
            ReservoirPy and scikit-learn; or several (a sequence, array or tensor), one of which
            `select` picks. Each is a number for all targets, or a sequence of m numbers, one for
            each target.
        fit_intercept: fit b; else b is 0.

    Attributes:
        weight: W, (m, N), float64; bias: b, (m,), float64. Buffers, zero before `solve`.
        strengths: all strengths, numbers or tuples of m numbers.
        strength: that which weight and bias were fitted with; None before `solve`.
        count: number of rows seen.

    Raises:
        ValueError: a size below 1, no strength, or a strength that is negative or not finite.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ridge: Numbers | Sequence[Numbers] = 1e-6,
        *,
        fit_intercept: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, fit_intercept)
        each = [reals("ridge", entry, (1, self.out_features)) for entry in listed("ridge", ridge)]
        if not each or min(map(min, each)) < 0:
            raise ValueError(f"ridge must be one or more finite numbers of at least 0, got {ridge}")
        self.strengths: tuple[Strength, ...]
        self.strengths = tuple(found[0] if len(found) == 1 else tuple(found) for found in each)
        self.strength: Strength | None = None
        self.count = 0

    def reset(self) -> None:
        """Discard the data seen so far; weight and bias are unchanged."""
        self.count = 0
        self._kept = {name: x for name, x in self._kept.items() if name not in RidgeSums._fields}

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> Ridge:
        """Add a batch: x (..., N) and y (..., m), any floating dtype, with equal leading axes.

        Raises:
            TypeError, ValueError: a wrong dtype or shape, or an element that is not finite.
        """
        x, y = self._rows(x, y)
        if not len(x):
            return self
        means = x.mean(0), y.mean(0)
        if not self.fit_intercept:
            means = torch.zeros_like(means[0]), torch.zeros_like(means[1])
        x, y = x - means[0], y - means[1]
        self._merge(RidgeSums(x.T @ x, x.T @ y, *means), len(x))
        return self

    @torch.no_grad()
    def update_gram(
        self,
        gram: Tensor,
        cross: Tensor,
        *,
        count: int | None = None,
        x_sum: Tensor | None = None,
        y_sum: Tensor | None = None,
    ) -> Ridge:
        """Add sums over rows.

        Args:
            gram: Σ x xᵀ, (N, N); cross: Σ x yᵀ, (N, m).
            count, x_sum, y_sum: number of rows, Σ x (N,) and Σ y (m,). An intercept needs all
                three. A column of ones among the targets of `reservoir_scan` gives x_sum.

        Raises:
            ValueError: a wrong shape, an element that is not finite, or a missing sum where an
                intercept is fitted.
        """
        size = self.in_features, self.out_features
        wanted: dict[str, tuple[object, tuple[int, ...]]]
        wanted = {"gram": (gram, (size[0], size[0])), "cross": (cross, size)}
        if self.fit_intercept:
            if count is None or x_sum is None or y_sum is None:
                raise ValueError("with fit_intercept, count, x_sum and y_sum must be given")
            wanted |= {"x_sum": (x_sum, size[:1]), "y_sum": (y_sum, size[1:])}
        for name, (value, shape) in wanted.items():
            if not isinstance(value, Tensor) or value.shape != shape:
                raise ValueError(f"{name} must be a tensor of shape {shape}, got {describe(value)}")
            check_finite(name, value)
        rows = 0 if count is None else integer("count", count, 0)
        device = self.weight.device
        gram, cross = (t.to(device, torch.float64) for t in (gram, cross))
        means = gram.new_zeros(size[0]), gram.new_zeros(size[1])
        if x_sum is not None and y_sum is not None and rows and self.fit_intercept:
            means = x_sum.to(means[0]) / rows, y_sum.to(means[1]) / rows
            gram = gram - rows * torch.outer(means[0], means[0])
            cross = cross - rows * torch.outer(means[0], means[1])
        self._merge(RidgeSums(gram, cross, *means), rows)
        return self

    @property
    def sums(self) -> RidgeSums | None:
        """What was kept of the `count` rows seen so far; None: no data. Not to be written to."""
        if "gram" not in self._kept:
            return None
        return RidgeSums(*(self._kept[name] for name in RidgeSums._fields))

    def hold(self, sums: RidgeSums, count: int) -> Ridge:
        """Replace the data seen so far by these sums of `count` rows.

        ValueError where a number is not finite: then everything is left as it was.
        """
        if not all(bool(tensor.isfinite().all()) for tensor in sums):
            raise ValueError("x or y is too large: its products are not finite in float64")
        self._kept = self._kept | sums._asdict()
        self.count = count
        return self

    def _merge(self, new: RidgeSums, count: int) -> None:
        device = self.weight.device
        known = self.sums
        old = RidgeSums(*(map(torch.zeros_like, new) if known is None else known))
        old = RidgeSums(*(tensor.to(device) for tensor in old))
        total = self.count + count
        part = count / total if total else 0.0
        dx, dy = new.x_mean - old.x_mean, new.y_mean - old.y_mean
        merged = RidgeSums(
            old.gram + new.gram + self.count * part * torch.outer(dx, dx),
            old.cross + new.cross + self.count * part * torch.outer(dx, dy),
            old.x_mean + part * dx,
            old.y_mean + part * dy,
        )
        self.hold(merged, total)

    @torch.no_grad()
    def solve(self) -> Ridge:
        """Fit with every strength, and use the first.

        Raises:
            RuntimeError: no data was seen, or the Gram matrix is not positive definite at a
                strength, which the message names (too few rows, or a strength below the sums'
                rounding error).
        """
        sums = self.sums
        if sums is None:
            raise RuntimeError("no data was seen yet: call update(x, y) first")
        every = [s for each in self.strengths for s in _numbers(each)]
        solved = {strength: self._solution(sums, strength) for strength in dict.fromkeys(every)}
        found = torch.stack(
            [
                solved[each]
                if isinstance(each, float)
                else torch.stack([solved[s][j] for j, s in enumerate(each)])
                for each in self.strengths
            ]
        )
        self._kept = self._kept | {
            "weights": found,
            "biases": sums.y_mean - found @ sums.x_mean,
        }
        return self.take(0)

    def _solution(self, sums: RidgeSums, strength: float) -> Tensor:
        """W (m, N) of one strength for all targets."""
        matrix = sums.gram.clone()
        matrix.diagonal().add_(strength)
        factor, info = torch.linalg.cholesky_ex(matrix)
        if info.item() or not factor.isfinite().all():
            raise RuntimeError(
                f"the Gram matrix of {self.count} rows is not positive definite at ridge "
                f"{strength}: take in more rows or raise ridge"
            )
        return torch.cholesky_solve(sums.cross, factor).T

    def fit(self, x: Tensor, y: Tensor) -> Ridge:
        """Discard earlier data, then fit x (..., N) to y (..., m) alone.

        Raises as `update` and `solve`, and then leaves everything as it was.
        """
        count, kept = self.count, self._kept
        self.reset()
        try:
            return self.update(x, y).solve()
        except (TypeError, ValueError, RuntimeError):
            self.count, self._kept = count, kept
            raise

    def take(self, index: int | Sequence[int] | Array) -> Ridge:
        """Use the solution of `strengths[index]`, or for target j that of `strengths[index[j]]`.

        RuntimeError before `solve`.
        """
        weights, biases = self._solved()
        picks, targets = listed("index", index), range(self.out_features)
        several = isinstance(index, Sequence) or getattr(index, "ndim", 0) > 0
        if several and len(picks) != len(targets):
            raise ValueError(f"index must have {len(targets)} numbers, got {len(picks)}")
        for pick in picks:
            if not 0 <= integer("index", pick) < len(weights):
                raise ValueError(f"index must lie in [0, {len(weights) - 1}], got {pick}")
        rows = picks if several else picks * len(targets)
        # copy_ keeps the buffers' dtype and device after the module was moved or cast.
        self.weight.copy_(weights[rows, targets])
        self.bias.copy_(biases[rows, targets])
        each = [_numbers(self.strengths[pick]) for pick in rows]
        own = tuple(found[j % len(found)] for j, found in zip(targets, each, strict=True))
        self.strength = own if several else self.strengths[picks[0]]
        return self

    def _solved(self) -> tuple[Tensor, Tensor]:
        """The weights (S, m, N) and biases (S, m) of every strength."""
        if "weights" not in self._kept:
            raise RuntimeError("nothing is fitted yet: call solve() or fit(x, y) first")
        return self._kept["weights"], self._kept["biases"]

    @torch.no_grad()
    def errors(self, x: Tensor, y: Tensor, *, per_target: bool = False) -> Tensor:
        """Mean squared error of every strength on x (..., N) and y (..., m): float64, (S,), with
        `per_target` (S, m).

        Raises:
            TypeError, ValueError: as `update`. RuntimeError before `solve`.
        """
        check_flag("per_target", per_target)
        weights, biases = self._solved()
        x, y = self._rows(x, y)
        if not len(x):
            raise ValueError("x must hold at least one row, got none")
        pairs = zip(weights.to(x.device), biases.to(x.device), strict=True)
        found = torch.stack([(F.linear(x, w, b) - y).square().mean(0) for w, b in pairs])
        return found if per_target else found.mean(1)

    def select(self, x: Tensor, y: Tensor, *, per_target: bool = False) -> Ridge:
        """Use the strength with the least mean squared error on held-out x (..., N), y (..., m):
        one strength for all targets, or with `per_target` each target's own."""
        best = self.errors(x, y, per_target=per_target).nan_to_num(math.inf).argmin(0)
        return self.take(best.tolist())

    def extra_repr(self) -> str:
        """The arguments that print shows."""
        return f"{self.in_features}, {self.out_features}, ridge={self.strengths}"


def _numbers(strength: Strength) -> tuple[float, ...]:
    return strength if isinstance(strength, tuple) else (strength,)

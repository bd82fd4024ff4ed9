"""Ridge regression in one pass over the data: Cholesky on a streamed Gram matrix in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resformer_kernels._core.checks import describe, integer
from resformer_kernels.nn.arguments import Numbers, check_finite, reals
from resformer_kernels.nn.state import KeepsTensors


class _Sums(NamedTuple):
    """What a fit needs of the data: products of the centred rows, and means."""

    gram: Tensor
    cross: Tensor
    x_mean: Tensor
    y_mean: Tensor


class Ridge(KeepsTensors):
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
            `select` picks.
        fit_intercept: fit b; else b is 0.

    Attributes:
        weight: W, (m, N), float64; bias: b, (m,), float64. Buffers, zero before `solve`.
        strength: the strength that weight and bias were fitted with; None before `solve`.
        count: number of rows seen.

    Raises:
        ValueError: a size below 1, no strength, or a strength that is negative or not finite.
    """

    narrowest = torch.float64
    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ridge: Numbers = 1e-6,
        *,
        fit_intercept: bool = True,
    ) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, 1)
        self.out_features = integer("out_features", out_features, 1)
        self.strengths = tuple(reals("ridge", ridge))
        if not self.strengths or min(self.strengths) < 0:
            raise ValueError(f"ridge must be one or more finite numbers of at least 0, got {ridge}")
        self.fit_intercept = fit_intercept
        size = self.out_features, self.in_features
        self.register_buffer("weight", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(size[0], dtype=torch.float64))
        self.strength: float | None = None
        self.count = 0

    def reset(self) -> None:
        """Discard the data seen so far; weight and bias are unchanged."""
        self.count = 0
        self._kept = {name: x for name, x in self._kept.items() if name not in _Sums._fields}

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
        self._merge(_Sums(x.T @ x, x.T @ y, *means), len(x))
        return self

    def _rows(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Data as finite rows, float64 on the module's device."""
        self._check("x", x, self.in_features)
        self._check("y", y, self.out_features)
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(
                f"x and y must have the same leading axes, got {tuple(x.shape)} and "
                f"{tuple(y.shape)}"
            )
        check_finite("x", x)
        check_finite("y", y)
        x, y = (t.to(self.weight.device, torch.float64) for t in (x, y))
        return x.reshape(-1, self.in_features), y.reshape(-1, self.out_features)

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
        self._merge(_Sums(gram, cross, *means), rows)
        return self

    def _check(self, name: str, value: object, size: int) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {describe(value)}")
        if value.dim() < 1 or value.shape[-1] != size:
            raise ValueError(f"{name} must be (..., {size}), got {describe(value)}")

    def _merge(self, new: _Sums, count: int) -> None:
        device = self.weight.device
        if "gram" in self._kept:
            old = _Sums(*(self._kept[name].to(device) for name in _Sums._fields))
        else:
            old = _Sums(*map(torch.zeros_like, new))
        total = self.count + count
        part = count / total if total else 0.0
        dx, dy = new.x_mean - old.x_mean, new.y_mean - old.y_mean
        merged = _Sums(
            old.gram + new.gram + self.count * part * torch.outer(dx, dx),
            old.cross + new.cross + self.count * part * torch.outer(dx, dy),
            old.x_mean + part * dx,
            old.y_mean + part * dy,
        )
        if not all(bool(tensor.isfinite().all()) for tensor in merged):
            raise ValueError("x or y is too large: its products are not finite in float64")
        self._kept = self._kept | merged._asdict()
        self.count = total

    @torch.no_grad()
    def solve(self) -> Ridge:
        """Fit with every strength, and use the first.

        Raises:
            RuntimeError: no data was seen, or the Gram matrix is not positive definite at a
                strength, which the message names (too few rows, or a strength below the sums'
                rounding error).
        """
        if "gram" not in self._kept:
            raise RuntimeError("no data was seen yet: call update(x, y) first")
        sums = _Sums(*(self._kept[name] for name in _Sums._fields))
        weights = []
        for strength in self.strengths:
            matrix = sums.gram.clone()
            matrix.diagonal().add_(strength)
            factor, info = torch.linalg.cholesky_ex(matrix)
            if info.item() or not factor.isfinite().all():
                raise RuntimeError(
                    f"the Gram matrix of {self.count} rows is not positive definite at ridge "
                    f"{strength}: take in more rows or raise ridge"
                )
            weights.append(torch.cholesky_solve(sums.cross, factor).T)
        found = torch.stack(weights)
        solved = {"weights": found, "biases": sums.y_mean - found @ sums.x_mean}
        self._kept = self._kept | solved
        return self.take(0)

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

    def take(self, index: int) -> Ridge:
        """Use the solution of `strengths[index]`. RuntimeError before `solve`."""
        weights, biases = self._solved()
        if not 0 <= integer("index", index) < len(weights):
            raise ValueError(f"index must lie in [0, {len(weights) - 1}], got {index}")
        # copy_ keeps the buffers' dtype and device after the module was moved or cast.
        self.weight.copy_(weights[index])
        self.bias.copy_(biases[index])
        self.strength = self.strengths[index]
        return self

    def _solved(self) -> tuple[Tensor, Tensor]:
        """The weights (S, m, N) and biases (S, m) of every strength."""
        if "weights" not in self._kept:
            raise RuntimeError("nothing is fitted yet: call solve() or fit(x, y) first")
        return self._kept["weights"], self._kept["biases"]

    @torch.no_grad()
    def errors(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error of every strength on x (..., N) and y (..., m): float64, (S,).

        Raises:
            TypeError, ValueError: as `update`. RuntimeError before `solve`.
        """
        weights, biases = self._solved()
        x, y = self._rows(x, y)
        if not len(x):
            raise ValueError("x must hold at least one row, got none")
        pairs = zip(weights.to(x.device), biases.to(x.device), strict=True)
        return torch.stack([(F.linear(x, w, b) - y).square().mean() for w, b in pairs])

    def select(self, x: Tensor, y: Tensor) -> Ridge:
        """Use the strength with the least mean squared error on held-out x (..., N), y (..., m)."""
        return self.take(int(self.errors(x, y).nan_to_num(math.inf).argmin()))

    def forward(self, x: Tensor) -> Tensor:
        """y (..., m) for x (..., N), computed in the weights' dtype and returned in x's."""
        self._check("x", x, self.in_features)
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """The arguments that print shows."""
        return f"{self.in_features}, {self.out_features}, ridge={self.strengths}"

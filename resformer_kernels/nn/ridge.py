"""Ridge regression in one pass over the data: Cholesky on a streamed Gram matrix in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resformer_kernels._core.checks import check_real, describe


class Ridge(nn.Module):
    """A linear readout y = W x + b, W = argmin Σ |y - W x - b|² + ridge |W|²; b is not penalised.

    Data comes in batches (`update`) or as pairs (XᵀX, XᵀY) such as `reservoir_scan(reduce="gram")`
    returns (`update_gram`), in any order, and is not stored. Means and centred products are merged
    batch by batch (Chan, Golub and LeVeque, 1983), so a large mean costs no precision. `solve` then
    factors one float64 matrix per strength; the data is read once for all of them.

    Args:
        in_features: N, the length of x.
        out_features: m, the length of y.
        ridge: the strength, added to the diagonal of the sum XᵀX (not of its mean), as in
            ReservoirPy and scikit-learn; or several, one of which `select` picks.
        fit_intercept: fit b; else b is 0.

    Attributes:
        weight: W, (m, N), float64; bias: b, (m,), float64. Buffers, zero before `solve`.
        strength: the strength that weight and bias were fitted with; None before `solve`.
        count: number of rows seen.

    Raises:
        ValueError: a size below 1, no strength, or a strength that is negative or not finite.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ridge: float | Sequence[float] = 1e-6,
        *,
        fit_intercept: bool = True,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {size!r}")
        strengths = tuple(ridge) if isinstance(ridge, Sequence) else (ridge,)
        for strength in strengths:
            check_real("ridge", strength)
        if not strengths or not all(math.isfinite(s) and s >= 0 for s in strengths):
            raise ValueError(f"ridge must be one or more finite numbers of at least 0, got {ridge}")
        self.in_features, self.out_features = in_features, out_features
        self.strengths, self.fit_intercept = strengths, fit_intercept
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float64))
        self.strength: float | None = None
        self._solutions: list[tuple[Tensor, Tensor]] = []
        self.reset()

    def reset(self) -> None:
        """Discard the data seen so far; weight and bias are unchanged."""
        size = self.in_features, self.out_features
        self.count = 0
        self._gram = self.weight.new_zeros(size[0], size[0], dtype=torch.float64)
        self._cross = self.weight.new_zeros(size, dtype=torch.float64)
        self._means = [self.weight.new_zeros(n, dtype=torch.float64) for n in size]

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> Ridge:
        """Add a batch: x (..., N) and y (..., m), any floating dtype, with equal leading axes."""
        self._check("x", x, self.in_features)
        self._check("y", y, self.out_features)
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(
                f"x and y must have the same leading axes, got {tuple(x.shape)} and "
                f"{tuple(y.shape)}"
            )
        device = self.weight.device
        x = x.reshape(-1, self.in_features).to(device, torch.float64)
        y = y.reshape(-1, self.out_features).to(device, torch.float64)
        if not len(x):
            return self
        means = [x.mean(0), y.mean(0)] if self.fit_intercept else [m * 0 for m in self._means]
        x, y = x - means[0], y - means[1]
        self._merge(x.T @ x, x.T @ y, means, len(x))
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
            ValueError: a wrong shape, or a missing sum where an intercept is fitted.
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
        device = self.weight.device
        gram, cross = (t.to(device, torch.float64) for t in (gram, cross))
        means = [m * 0 for m in self._means]
        if x_sum is not None and y_sum is not None and count and self.fit_intercept:
            means = [t.to(device, torch.float64) / count for t in (x_sum, y_sum)]
            gram = gram - count * torch.outer(means[0], means[0])
            cross = cross - count * torch.outer(means[0], means[1])
        self._merge(gram, cross, means, count or 0)
        return self

    def _check(self, name: str, value: object, size: int) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {describe(value)}")
        if value.dim() < 1 or value.shape[-1] != size:
            raise ValueError(f"{name} must be (..., {size}), got {describe(value)}")

    def _merge(self, gram: Tensor, cross: Tensor, means: list[Tensor], count: int) -> None:
        device = gram.device
        self._gram, self._cross = self._gram.to(device), self._cross.to(device)
        total = self.count + count
        shift = [new - old.to(device) for new, old in zip(means, self._means, strict=True)]
        share = self.count * count / total if total else 0.0
        self._gram += gram + share * torch.outer(shift[0], shift[0])
        self._cross += cross + share * torch.outer(shift[0], shift[1])
        if total:
            pairs = zip(self._means, shift, strict=True)
            self._means = [old.to(device) + s * (count / total) for old, s in pairs]
        self.count = total

    @torch.no_grad()
    def solve(self) -> Ridge:
        """Fit with every strength, and use the first.

        Raises:
            RuntimeError: the Gram matrix is not positive definite at a strength, which the message
                names (too few rows, or a strength below the sums' rounding error).
        """
        self._solutions = []
        for strength in self.strengths:
            matrix = self._gram.clone()
            matrix.diagonal().add_(strength)
            factor, info = torch.linalg.cholesky_ex(matrix)
            if info.item() or not factor.isfinite().all():
                raise RuntimeError(
                    f"the Gram matrix of {self.count} rows is not positive definite at ridge "
                    f"{strength}: take in more rows or raise ridge"
                )
            weight = torch.cholesky_solve(self._cross, factor).T.contiguous()
            self._solutions.append((weight, self._means[1] - weight @ self._means[0]))
        return self.take(0)

    def fit(self, x: Tensor, y: Tensor) -> Ridge:
        """Discard earlier data, then fit x (..., N) to y (..., m) alone."""
        self.reset()
        return self.update(x, y).solve()

    def take(self, index: int) -> Ridge:
        """Use the solution of `strengths[index]`. RuntimeError before `solve`."""
        if not self._solutions:
            raise RuntimeError("nothing is fitted yet: call solve() or fit(x, y) first")
        weight, bias = self._solutions[index]
        # copy_ keeps the buffers' dtype and device after the module was moved or cast.
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.strength = self.strengths[index]
        return self

    @torch.no_grad()
    def errors(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error of every strength on x (..., N) and y (..., m): float64, (S,)."""
        if not self._solutions:
            raise RuntimeError("nothing is fitted yet: call solve() or fit(x, y) first")
        x, y = x.to(self._gram.device, torch.float64), y.to(self._gram.device, torch.float64)
        return torch.stack([(F.linear(x, w, b) - y).square().mean() for w, b in self._solutions])

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

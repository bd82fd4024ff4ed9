"""Recursive least squares: a linear readout that learns while data comes in, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core.checks import real
from resformer_kernels.nn.readout import LinearReadout

_ROWS = 4096
"""Rows taken in at once, at most: a float64 copy of them is held."""
_SPARE = 4
"""Times N ε and the largest entry of the Gram matrix: the least penalty."""


class _Sums(NamedTuple):
    """What is known of the rows so far: weighted sums over centred rows, and the inverse of the
    Gram matrix with the penalty, up to the error that collected since it was last factored.
    """

    gram: Tensor
    cross: Tensor
    x_mean: Tensor
    y_mean: Tensor
    mass: Tensor
    penalty: Tensor
    inverse: Tensor
    weight: Tensor


class RLS(LinearReadout):
    """A linear readout y = W x + b that every `update` makes the least-squares fit of all rows yet.

    After t rows, W and b minimise Σ_i λ^(t-i) |y_i - W x_i - b|² + λ^t α |W|², as recursive least
    squares does (Haykin, Adaptive Filter Theory, 4th edition, chapter 9). With λ = 1 that is
    `Ridge` with strength α. An update by T rows costs as much as T updates by one, or less, and
    gives the same W and b up to rounding.

    The inverse P of the Gram matrix is updated by Woodbury's identity, and made anew by Cholesky
    from the Gram matrix itself every N rows, or sooner where λ forgets sooner, so that rounding
    errors do not collect. λ^t α decays, and states of a reservoir hardly excite some directions, so
    the penalty is held at 4 N ε times the largest diagonal entry of the Gram matrix or above, as
    float64 could not factor it otherwise.

    All buffers stay float64 in a module that is cast. They are saved, moved and copied with it, so
    that a loaded readout learns on.

    Args:
        in_features: N, the length of x.
        out_features: m, the length of y.
        forgetting: λ, in (0, 1]: the weight of a row relative to that of the next.
        alpha: α > 0, the strength of the penalty before the first row.
        fit_intercept: fit b; else b is 0. b is not penalised.

    Attributes:
        weight: W, (m, N), float64; bias: b, (m,), float64. Buffers, zero before the first update.

    Raises:
        TypeError, ValueError: a size below 1, or a number out of range.
    """

    gram: Tensor
    cross: Tensor
    x_mean: Tensor
    y_mean: Tensor
    mass: Tensor
    penalty: Tensor
    inverse: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        forgetting: float = 1.0,
        alpha: float = 1e-6,
        fit_intercept: bool = True,
    ) -> None:
        super().__init__(in_features, out_features, fit_intercept)
        self.forgetting = float(real("forgetting", forgetting))
        self.alpha = float(real("alpha", alpha))
        if not 0 < self.forgetting <= 1:
            raise ValueError(f"forgetting must lie in (0, 1], got {forgetting}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be a positive finite number, got {alpha}")
        for name, value in self._nothing()._asdict().items():
            self.register_buffer(name, value)
        self._since = 0

    def _nothing(self) -> _Sums:
        """The sums of no rows."""
        n, m, like = self.in_features, self.out_features, self.weight
        return _Sums(
            gram=like.new_zeros(n, n),
            cross=like.new_zeros(n, m),
            x_mean=like.new_zeros(n),
            y_mean=like.new_zeros(m),
            mass=like.new_zeros(()),
            penalty=like.new_full((), self.alpha),
            inverse=torch.eye(n, dtype=like.dtype, device=like.device) / self.alpha,
            weight=like.new_zeros(m, n),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RLS:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            assert old is not None
            assert new is not None
            # What left the meta device holds nothing yet.
            self._buffers[name] = (new if old.is_meta else old).to(new.device, torch.float64)
        return self

    def reset(self) -> None:
        """Forget all rows: weight and bias are zeros again."""
        with torch.inference_mode(False):
            self._become(self._nothing(), 0)

    def update(self, x: Tensor, y: Tensor) -> RLS:
        """Learn from rows x (..., N) and y (..., m), the first first: any floating dtype, with
        equal leading axes.

        Raises:
            TypeError, ValueError: a wrong dtype or shape, an element that is not finite, or one
                too large for its products. The readout is then as it was.
        """
        # Training can use what was made under inference_mode only if this was not.
        with torch.inference_mode(False), torch.no_grad():
            x, y = self._rows(x, y)
            sums, since = _Sums(*(getattr(self, name) for name in _Sums._fields)), self._since
            for rows in zip(x.split(_ROWS), y.split(_ROWS), strict=True):
                if len(rows[0]):
                    sums, since = self._after(sums, since, *rows)
            self._become(sums, since)
        return self

    def become(self, other: RLS) -> None:
        """Take over all that `other`, of the same sizes, has learned."""
        self._become(_Sums(*(getattr(other, name) for name in _Sums._fields)), other._since)

    def _become(self, sums: _Sums, since: int) -> None:
        for name, value in sums._asdict().items():
            setattr(self, name, value)
        self.bias = sums.y_mean - sums.weight @ sums.x_mean
        self._since = since

    def _after(self, sums: _Sums, since: int, x: Tensor, y: Tensor) -> tuple[_Sums, int]:
        """The sums after T more rows, and the number of rows since the Gram matrix was factored."""
        since, decay = since + len(x), self.forgetting ** len(x)
        x, y, means = self._weighted(sums, x, y)
        new = sums._replace(
            gram=decay * sums.gram + x.T @ x,
            cross=decay * sums.cross + x.T @ y,
            penalty=decay * sums.penalty,
            **means,
        )
        half_life = math.inf if self.forgetting == 1 else math.log(0.5) / math.log(self.forgetting)
        # Factoring costs about as much as updating the inverse by a quarter of N rows.
        few = since + 4 * len(x) < min(self.in_features, half_life)
        updated = _by_woodbury(new, decay, x, y) if few else None
        if updated is None:
            updated, since = _factored(new), 0
        found = (updated.gram.diagonal(), updated.inverse.diagonal(), updated.weight)
        if not all(bool(tensor.isfinite().all()) for tensor in found):
            raise ValueError("x or y is too large: its products are not finite in float64")
        return updated, since

    def _weighted(
        self, sums: _Sums, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Rows whose products are added to the sums, and the new means and mass.

        One more row, the difference of the means, merges centred rows with those before (Chan,
        Golub and LeVeque, 1983).
        """
        ages = torch.arange(len(x) - 1, -1, -1, dtype=x.dtype, device=x.device)
        weights = self.forgetting**ages
        roots = weights.sqrt()[:, None]
        if not self.fit_intercept:
            return roots * x, roots * y, {}
        mass, old = weights.sum(), self.forgetting ** len(x) * sums.mass
        means = weights @ x / mass, weights @ y / mass
        dx, dy = means[0] - sums.x_mean, means[1] - sums.y_mean
        part, root = mass / (old + mass), (old * mass / (old + mass)).sqrt()
        return (
            torch.cat((roots * (x - means[0]), root * dx[None])),
            torch.cat((roots * (y - means[1]), root * dy[None])),
            {
                "x_mean": sums.x_mean + part * dx,
                "y_mean": sums.y_mean + part * dy,
                "mass": old + mass,
            },
        )

    def extra_repr(self) -> str:
        """The arguments that print shows."""
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{sizes}, forgetting={self.forgetting}, alpha={self.alpha}"


def _factored(sums: _Sums) -> _Sums:
    """With W and the inverse from the Gram matrix itself."""
    matrix = sums.gram.clone()
    least = _SPARE * len(matrix) * torch.finfo(matrix.dtype).eps * matrix.diagonal().max()
    matrix.diagonal().add_(torch.maximum(sums.penalty, least))
    factor, info = torch.linalg.cholesky_ex(matrix)
    if info.item():
        raise ValueError("x is too large or too small: float64 cannot factor its Gram matrix")
    weight = torch.cholesky_solve(sums.cross, factor).T
    return sums._replace(inverse=torch.cholesky_inverse(factor), weight=weight)


def _by_woodbury(sums: _Sums, decay: float, x: Tensor, y: Tensor) -> _Sums | None:
    """With W and the inverse P after rows X (T, N), for T well below N; None where the errors of P
    show.

    P' = (P - GᵀG) / λ^T and W' = W + EᵀG, where L Lᵀ = λ^T I + X P Xᵀ, G = L⁻¹ X P and
    E = L⁻¹ (Y - X Wᵀ).
    """
    projected = x @ sums.inverse
    inner = projected @ x.T
    inner.diagonal().add_(decay)
    factor, info = torch.linalg.cholesky_ex(inner)
    if info.item():
        return None
    gain, error = (
        torch.linalg.solve_triangular(factor, part, upper=False)
        for part in (projected, y - x @ sums.weight.T)
    )
    inverse = (sums.inverse - gain.T @ gain) / decay
    # Rounding would make it less symmetric with every update.
    symmetric = (inverse + inverse.T) / 2
    return sums._replace(inverse=symmetric, weight=sums.weight + error.T @ gain)

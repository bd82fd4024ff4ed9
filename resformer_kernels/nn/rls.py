"""Recursive least squares: a linear readout that learns while data comes in, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from resformer_kernels._core.checks import real
from resformer_kernels.nn.readout import LinearReadout

_ROWS = 4096
"""Rows taken in at once, at most: a float64 copy of them is held."""
_SPARE = 4
"""Times N ε and the largest entry of the Gram matrix: the least penalty."""
_LEAST = 1e-50
"""The least penalty where all is forgotten."""


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

    products: Tensor
    means: Tensor
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
        n, m = self.in_features, self.out_features
        like = self.weight
        self.register_buffer("products", like.new_empty(n, n + m))
        self.register_buffer("means", like.new_empty(n + m))
        self.register_buffer("mass", like.new_empty(()))
        self.register_buffer("penalty", like.new_empty(()))
        self.register_buffer("inverse", like.new_empty(n, n))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Forget all rows: weight and bias are zeros again."""
        for buffer in (self.weight, self.bias, self.products, self.means, self.mass, self.inverse):
            buffer.zero_()
        self.penalty.fill_(self.alpha)
        self.inverse.diagonal().fill_(1 / self.alpha)
        self._since = 0

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

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> RLS:
        """Learn from rows x (..., N) and y (..., m), the first first: any floating dtype, with
        equal leading axes.

        Raises:
            TypeError, ValueError: a wrong dtype or shape, an element that is not finite, or one
                too large for its products. The readout is then as it was.
        """
        rows = torch.cat(self._rows(x, y), 1)
        # No product of centred rows exceeds that, nor any sum of them.
        bound = 8 * rows.square().sum() + self.products.diagonal().sum()
        if not bound.isfinite():
            raise ValueError("x or y is too large: its products are not finite in float64")
        for piece in rows.split(_ROWS):
            if len(piece):
                self._learn(piece)
        n = self.in_features
        self.bias.copy_(self.means[n:] - self.weight @ self.means[:n])
        return self

    def become(self, other: RLS) -> None:
        """Take over all that `other`, of the same sizes, has learned."""
        for own, its in zip(self.buffers(), other.buffers(), strict=True):
            own.copy_(its)
        self._since = other._since

    def _learn(self, rows: Tensor) -> None:
        """Take in T more rows [x, y], (T, N + m)."""
        n, count, decay = self.in_features, len(rows), self.forgetting ** len(rows)
        rows = self._weighted(rows, decay)
        x, y = rows[:, :n], rows[:, n:]
        self.products.addmm_(x.T, rows, beta=decay)
        self.penalty.mul_(decay)
        self._since += count
        half_life = math.inf if self.forgetting == 1 else math.log(0.5) / math.log(self.forgetting)
        # Factoring costs about as much as updating the inverse by a quarter of N rows.
        few = self._since + 4 * count < min(n, half_life)
        if not few or not self._updated(x, y, decay):
            self._factor()

    def _weighted(self, rows: Tensor, decay: float) -> Tensor:
        """Rows whose products are added to the sums; means and mass become the new ones.

        One more row, the difference of the means, merges centred rows with those before (Chan,
        Golub and LeVeque, 1983).
        """
        ages = torch.arange(len(rows) - 1, -1, -1, dtype=rows.dtype, device=rows.device)
        weights = self.forgetting**ages
        roots = weights.sqrt()[:, None]
        if not self.fit_intercept:
            return roots * rows
        mass, old = weights.sum(), decay * self.mass
        mean = weights @ rows / mass
        shift, total = mean - self.means, old + mass
        self.means.addcmul_(mass / total, shift)
        self.mass.copy_(total)
        return torch.cat((roots * (rows - mean), (old * mass / total).sqrt() * shift[None]))

    def _factor(self) -> None:
        """W and the inverse from the Gram matrix itself."""
        n = self.in_features
        matrix = self.products[:, :n].clone()
        least = _SPARE * n * torch.finfo(matrix.dtype).eps * matrix.diagonal().max()
        matrix.diagonal().add_(torch.maximum(self.penalty, least).clamp(min=_LEAST))
        factor = torch.linalg.cholesky(matrix)
        self.weight.copy_(torch.cholesky_solve(self.products[:, n:], factor).T)
        self.inverse.copy_(torch.cholesky_inverse(factor))
        self._since = 0

    def _updated(self, x: Tensor, y: Tensor, decay: float) -> bool:
        """W and the inverse P after rows X (T, N), Y (T, m), for T well below N; False, and both as
        they were, where the errors of P show.

        P' = (P - GᵀG) / λ^T and W' = W + EᵀG, where L Lᵀ = λ^T I + X P Xᵀ, G = L⁻¹ X P and
        E = L⁻¹ (Y - X Wᵀ).
        """
        projected = x @ self.inverse
        inner = projected @ x.T
        inner.diagonal().add_(decay)
        factor, info = torch.linalg.cholesky_ex(inner)
        if info.item():
            return False
        right = torch.cat((projected, y - x @ self.weight.T), 1)
        solved = torch.linalg.solve_triangular(factor, right, upper=False)
        gain, error = solved[:, : self.in_features], solved[:, self.in_features :]
        self.inverse.addmm_(gain.T, gain, beta=1 / decay, alpha=-1 / decay)
        self.weight.addmm_(error.T, gain)
        return True

    def extra_repr(self) -> str:
        """The arguments that print shows."""
        sizes = f"{self.in_features}, {self.out_features}"
        return f"{sizes}, forgetting={self.forgetting}, alpha={self.alpha}"

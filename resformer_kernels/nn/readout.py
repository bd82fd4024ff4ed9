"""What linear readouts share: weights in float64, and the data that they are fitted to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from resformer_kernels._core.checks import check_finite, check_flag, describe, integer
from resformer_kernels.nn.state import KeepsTensors


class LinearReadout(KeepsTensors):
    """y = W x + b, with W and b fitted to data and not by gradients.

    Attributes:
        weight: W, (m, N), float64; bias: b, (m,), float64. Buffers, zero before a fit.
    """

    narrowest = torch.float64
    weight: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int, fit_intercept: bool) -> None:
        super().__init__()
        self.in_features = integer("in_features", in_features, 1)
        self.out_features = integer("out_features", out_features, 1)
        check_flag("fit_intercept", fit_intercept)
        self.fit_intercept = fit_intercept
        size = self.out_features, self.in_features
        self.register_buffer("weight", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("bias", torch.zeros(size[0], dtype=torch.float64))

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

    def _check(self, name: str, value: object, size: int) -> None:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {describe(value)}")
        if value.dim() < 1 or value.shape[-1] != size:
            raise ValueError(f"{name} must be (..., {size}), got {describe(value)}")

    def forward(self, x: Tensor) -> Tensor:
        """y (..., m) for x (..., N), computed in the weights' dtype and returned in x's."""
        self._check("x", x, self.in_features)
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)

"""Reservoirs step by step in plain PyTorch, in the dtype of their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.nn import Reservoir

FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "csr": {"layout": "csr"},
    "ring": {"topology": "ring"},
    "diagonal": {"topology": "diagonal"},
    "groups": {"groups": 3, "lr": (1.0, 0.3, 0.1), "sr": (0.9, 1.1, 0.5)},
}


def make(input_dim: int = 2, feedback_dim: int = 3, **options: Any) -> Reservoir:
    """A reservoir of 30 units in float64."""
    own: dict[str, Any] = {
        "feedback_dim": feedback_dim,
        "rc_connectivity": 0.3,
        "input_connectivity": 0.8,
        "fb_connectivity": 0.7,
        "lr": 0.6,
        "bias_scaling": 0.2,
        "seed": 1,
        "dtype": torch.float64,
    }
    return Reservoir(30, input_dim, **(own | options))


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def step(reservoir: Reservoir, h: Tensor, u: Tensor | None, y: Tensor | None) -> Tensor:
    """h_t from h_{t-1}, (B, N), u_t and y_{t-1}."""
    z = h @ reservoir.dense_weight().T
    for value, weight in ((u, reservoir.input_weight), (y, reservoir.feedback_weight)):
        if value is not None and weight is not None:
            z = z + value @ weight.T
    if reservoir.bias is not None:
        z = z + reservoir.bias
    return (1 - reservoir.leak) * h + reservoir.leak * z.tanh()


def forced(
    reservoir: Reservoir,
    u: Tensor | None,
    y: Tensor,
    h: Tensor | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """States (B, T, N) under the teacher y (B, T, m)."""
    h = y.new_zeros(len(y), reservoir.units) if h is None else h
    fed = torch.zeros_like(y[:, 0]) if first is None else first
    states = []
    for t in range(y.shape[1]):
        h = step(reservoir, h, None if u is None else u[:, t], fed)
        fed = y[:, t]
        states.append(h)
    return torch.stack(states, 1)


def closed(
    reservoir: Reservoir,
    readout: Callable[[Tensor], Tensor],
    h: Tensor,
    steps: int,
    u: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (B, steps, m) fed back, and the last state: as input, or through W_fb."""
    outputs = []
    y = readout(h) if first is None else first
    for t in range(steps):
        if reservoir.feedback_weight is None:
            outputs.append(y)
            h = step(reservoir, h, y, None)
            y = readout(h)
        else:
            h = step(reservoir, h, None if u is None else u[:, t], y)
            y = readout(h)
            outputs.append(y)
    return torch.stack(outputs, 1), h

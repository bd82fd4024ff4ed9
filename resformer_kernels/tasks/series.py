"""Benchmark series for reservoirs. Every function returns float64 tensors, time first.

Arguments of another type or out of range raise TypeError or ValueError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resformer_kernels._core.checks import integer, real

LORENZ_EXPONENT = 0.9056
"""The largest Lyapunov exponent of the Lorenz system at (10, 28, 8/3), per unit of time."""


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(integer("seed", seed))


def _times(step: float, substeps: int) -> tuple[float, int]:
    """Both checked: a sample's step of time, and what it is divided into."""
    step = real("step", step)
    if not 0 < step < math.inf:
        raise ValueError(f"step must be positive and finite, got {step}")
    return step, integer("substeps", substeps, 1)


def narma10(length: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """NARMA-10 (Atiya and Parlos, 2000): inputs u and targets y, each (length, 1).

    y(t+1) = 0.3 y(t) + 0.05 y(t) Σᵢ₌₀..₉ y(t-i) + 1.5 u(t-9) u(t) + 0.1, u uniform in [0, 0.5].
    Row t holds u(t) and y(t+1), which u up to t determines. Inputs for which the recurrence
    diverges are rare, and are redrawn.
    """
    length, generator = integer("length", length, 1), _generator(seed)
    while True:
        drawn = 0.5 * torch.rand(length + 10, generator=generator, dtype=torch.float64)
        u, y = drawn.tolist(), [0.0] * 10
        for t in range(9, length + 10):
            y.append(
                0.3 * y[t] + 0.05 * y[t] * sum(y[t - 9 : t + 1]) + 1.5 * u[t - 9] * u[t] + 0.1
                if abs(y[t]) < 2.0
                else 2.0
            )
        targets = torch.tensor(y[-length:], dtype=torch.float64)
        if targets.max() < 2.0:
            return drawn[10:, None], targets[:, None]


def mackey_glass(
    length: int,
    *,
    tau: float = 17.0,
    seed: int = 0,
    step: float = 1.0,
    substeps: int = 10,
    transient: int = 1000,
) -> Tensor:
    """The Mackey-Glass series x (length, 1), one sample per `step` of time.

    dx/dt = 0.2 x(t-τ) / (1 + x(t-τ)¹⁰) - 0.1 x(t), by fourth-order Runge-Kutta in steps of
    step / substeps. The delayed value in mid-step comes from cubic Hermite interpolation, which
    preserves the order of convergence. The first `transient` of time is dropped. The history before
    t = 0 is a random constant near 1.2.

    Raises:
        ValueError: τ is not a multiple of step / substeps, or less than twice that.
    """
    length, (step, substeps) = integer("length", length, 1), _times(step, substeps)
    tau, transient = real("tau", tau), integer("transient", transient, 0)
    h = step / substeps
    if not -math.inf < tau < math.inf:
        raise ValueError(f"tau must be finite, got {tau}")
    lag = round(tau / h)
    if lag < 2 or abs(lag * h - tau) > 1e-9:
        raise ValueError(f"tau must be a multiple, from 2, of step / substeps = {h}, got {tau}")
    start = torch.rand((), generator=_generator(seed), dtype=torch.float64)
    x = [1.2 + 0.2 * (float(start) - 0.5)] * (lag + 1)
    slopes = [0.0] * lag

    def production(delayed: float) -> float:
        return 0.2 * delayed / (1.0 + delayed**10)

    dropped = round(transient / step) * substeps
    for t in range(lag, lag + dropped + length * substeps):
        now, before, after = x[t], x[t - lag], x[t - lag + 1]
        # The slope jumps at time 0, row `lag`; before it the history is constant.
        slope_after = 0.0 if t - lag + 1 == lag else slopes[t - lag + 1]
        middle = 0.5 * (before + after) + 0.125 * h * (slopes[t - lag] - slope_after)
        p0, p1, p2 = production(before), production(middle), production(after)
        k1 = p0 - 0.1 * now
        k2 = p1 - 0.1 * (now + 0.5 * h * k1)
        k3 = p1 - 0.1 * (now + 0.5 * h * k2)
        k4 = p2 - 0.1 * (now + h * k3)
        slopes.append(k1)
        x.append(now + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    samples = x[lag + dropped :: substeps][:length]
    return torch.tensor(samples, dtype=torch.float64)[:, None]


def lorenz(
    length: int,
    *,
    step: float = 0.02,
    substeps: int = 10,
    seed: int = 0,
    transient: int = 40,
) -> Tensor:
    """The Lorenz system at (10, 28, 8/3): x, y, z (length, 3), one sample per `step` of time.

    Fourth-order Runge-Kutta in steps of step / substeps, from a random point; the first `transient`
    of time is dropped.
    """
    length, (step, substeps) = integer("length", length, 1), _times(step, substeps)
    transient, generator = integer("transient", transient, 0), _generator(seed)
    h = step / substeps
    x, y, z = (1.0 + torch.rand(3, generator=generator, dtype=torch.float64)).tolist()

    def slope(x: float, y: float, z: float) -> tuple[float, float, float]:
        return 10.0 * (y - x), x * (28.0 - z) - y, x * y - 8.0 / 3.0 * z

    rows: list[tuple[float, float, float]] = []
    dropped = round(transient / step)
    for sample in range(dropped + length):
        if sample >= dropped:
            rows.append((x, y, z))
        for _ in range(substeps):
            a = slope(x, y, z)
            b = slope(x + 0.5 * h * a[0], y + 0.5 * h * a[1], z + 0.5 * h * a[2])
            c = slope(x + 0.5 * h * b[0], y + 0.5 * h * b[1], z + 0.5 * h * b[2])
            d = slope(x + h * c[0], y + h * c[1], z + h * c[2])
            x += h / 6 * (a[0] + 2 * b[0] + 2 * c[0] + d[0])
            y += h / 6 * (a[1] + 2 * b[1] + 2 * c[1] + d[1])
            z += h / 6 * (a[2] + 2 * b[2] + 2 * c[2] + d[2])
    return torch.tensor(rows, dtype=torch.float64)


def delays(length: int, longest: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The memory-capacity task (Jaeger, 2001): u (length, 1), uniform in [-1, 1], and its past.

    Targets are (length, longest): column k holds u(t - 1 - k), drawn too where that precedes t = 0.
    """
    length, longest = integer("length", length, 1), integer("longest", longest, 1)
    generator = _generator(seed)
    drawn = 2 * torch.rand(length + longest, generator=generator, dtype=torch.float64) - 1
    past = torch.stack([drawn[longest - k : longest - k + length] for k in range(1, longest + 1)])
    return drawn[longest:, None], past.T.contiguous()

"""Whether a reservoir forgets its start: its spectrum, and its contraction under a drive."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_finite, integer
from resformer_kernels.nn.reservoir import Reservoir
from resformer_kernels.nn.reservoir_weights import spectral_radius
from resformer_kernels.reservoir.record import UNBOUNDED

_FLOOR = {torch.float32: 1e-5, torch.float64: 1e-13}


@dataclass(frozen=True)
class StabilityReport:
    """The result of `stability_report`.

    Attributes:
        spectral_radius: spectral radius of W, over all groups.
        eigenvalues: eigenvalues of (1-a)I + aW, the step where f has slope 1: complex128 (N,). It
            is tanh's at 0; a sigmoid's slope is at most 1/4, a softmax's 1/2.
        linear_radius: their largest modulus.
        linear_norm: the largest singular value of (1-a)I + aW. Below 1, every activation contracts
            under every drive; above, that depends on the drive.
        contraction: the measured factor per step by which two trajectories approach each other
            under the drive. Below 1 the reservoir forgets its start (the echo state property holds
            for this drive); above 1 it is chaotic or diverges.
        forgetting_steps: steps in which a difference falls to a millionth at that rate; infinite
            where it does not fall.
        largest_state: the largest modulus of a state element.
        bounded: whether the activation bounds the state for all weights.
    """

    spectral_radius: float
    eigenvalues: Tensor
    linear_radius: float
    linear_norm: float
    contraction: float
    forgetting_steps: float
    largest_state: float
    bounded: bool

    @property
    def forgets(self) -> bool:
        """Whether trajectories approached each other under the drive."""
        return self.contraction < 1

    def __str__(self) -> str:
        lines = [
            ("spectral radius of W", f"{self.spectral_radius:.4g}"),
            ("spectral radius of (1-a)I + aW", f"{self.linear_radius:.4g}"),
            ("norm of (1-a)I + aW", f"{self.linear_norm:.4g}"),
            ("measured contraction a step", f"{self.contraction:.4g}"),
            ("steps to forget to 1e-6", f"{self.forgetting_steps:.4g}"),
            ("largest state element", f"{self.largest_state:.4g}"),
            ("verdict", "forgets its start" if self.forgets else "does not forget its start"),
        ]
        return "\n".join(f"{name:32}{value}" for name, value in lines)


@torch.no_grad()
def stability_report(
    reservoir: Reservoir, inputs: Tensor | None = None, *, seed: int = 0
) -> StabilityReport:
    """Measure a reservoir under a drive.

    Two trajectories, from 0 and from a random state in [-1, 1], get the same inputs. The factor by
    which they approach is the exponential of the largest conditional Lyapunov exponent, which
    depends on the drive as well as on W: a spectral radius below 1 is neither necessary nor
    sufficient.

    Args:
        reservoir: the reservoir; its stored state is unchanged.
        inputs: the drive, (T, n_in), with feedback [u_t, y_{t-1}], (T, n_in + m): the reservoir
            is measured under a teacher, not in closed loop. None: 1000 steps of uniform noise in
            [-1, 1].
        seed: seeds the random state and noise.

    Raises:
        ValueError: inputs is not (T, n_in), has no steps or is not finite, or the weights are not.

    Warns:
        UserWarning: the activation is unbounded and the trajectories do not approach.
    """
    generator = torch.Generator().manual_seed(integer("seed", seed))
    like = reservoir.input_weight
    options: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
    width = reservoir.input_dim + reservoir.feedback_dim
    if inputs is None:
        inputs = 2 * torch.rand(1000, width, **options) - 1
    if inputs.dim() != 2 or inputs.shape[1] != width or not len(inputs):
        raise ValueError(
            f"inputs must be (T, {width}) with at least one step, got {tuple(inputs.shape)}"
        )
    check_finite("inputs", inputs)
    check_finite("reservoir.input_weight", like)
    check_finite("reservoir.dense_weight()", reservoir.dense_weight())
    start = 2 * torch.rand(reservoir.units, **options) - 1
    starts = torch.stack((torch.zeros_like(start), start)).to(like.device, reservoir.state_dtype)
    states, _ = reservoir.run(inputs.to(like).expand(2, -1, -1), starts)
    contraction = _rate(torch.cat((starts[:, None], states), 1), _FLOOR[starts.dtype])
    bounded = reservoir.activation not in UNBOUNDED
    steps = reservoir.step_matrices()
    eigenvalues = torch.cat([torch.linalg.eigvals(step) for step in steps])
    report = StabilityReport(
        spectral_radius=spectral_radius(reservoir.dense_weight()),
        eigenvalues=eigenvalues,
        linear_radius=float(eigenvalues.abs().max()),
        linear_norm=max(float(torch.linalg.matrix_norm(step, 2)) for step in steps),
        contraction=contraction,
        forgetting_steps=_steps_to_forget(contraction),
        largest_state=float(states.abs().max()),
        bounded=bounded,
    )
    if not bounded and not report.forgets:
        warnings.warn(
            f"activation {reservoir.activation!r} is unbounded and the reservoir does not contract "
            f"(measured factor {contraction:.4g} a step): lower sr",
            UserWarning,
            stacklevel=2,
        )
    return report


def _rate(states: Tensor, floor: float) -> float:
    """Geometric mean factor per step of |states[1] - states[0]| while above `floor`.

    states: (2, T + 1, N).
    """
    distance = (states[1] - states[0]).double().norm(dim=1)
    if not distance.isfinite().all():
        return float("inf")
    scale = distance[0] + states.double().norm(dim=2).max() * 1e-2
    above = torch.nonzero(distance > floor * scale)
    last = int(above[-1]) if len(above) else 0
    if last == 0:
        # The trajectories met in a single step: this is an upper bound.
        return float(distance[1] / distance[0].clamp_min(1e-300))
    # The first half holds the transient of a start outside the attractor.
    first = last // 2
    return float((distance[last] / distance[first]) ** (1 / (last - first)))


def _steps_to_forget(contraction: float) -> float:
    if contraction >= 1:
        return float("inf")
    if contraction <= 0:
        return 1.0
    return float(torch.tensor(1e-6).log() / torch.tensor(contraction).log())

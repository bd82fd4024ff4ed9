"""What every part of `device-check` and `tune` shares: settings, and distances."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 0.02
"""The most ‖ours - peer‖ / ‖peer‖ of a bfloat16 output or gradient: several times rounding's."""


@dataclass(frozen=True)
class Settings:
    """Settings that all jobs of a run share."""

    device: str
    tiny: bool = False
    """Small cases, to try out the run itself."""
    samples: int = 7
    repeats: int = 20
    """Runs of each kernel on the same inputs, whose bits are compared."""

    def synchronize(self) -> None:
        """Wait for the device, and raise its errors."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()


def relative_distance(mine: Tensor, true: Tensor) -> float:
    """‖mine - true‖ / ‖true‖, in float32."""
    true = true.float()
    return float((mine.float() - true).norm() / true.norm())


def tensors(result: object) -> Sequence[Tensor]:
    """The output that a call returned, or the gradients; none of a call that returns nothing."""
    if result is None:
        return ()
    if isinstance(result, Tensor):
        return (result,)
    assert isinstance(result, tuple)
    return result

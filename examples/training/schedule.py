"""The learning rate of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("cosine", "wsd")


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up to `peak`, then one of two ways down to `final * peak`.

    "cosine" follows half a cosine; "wsd" (warm-up, stable, decay: Hu et al., arXiv 2404.06395)
    stays at the peak and falls linearly over the last `decay` of all steps.
    """

    kind: str
    peak: float
    steps: int
    warmup: int
    decay: float
    final: float

    def rate(self, step: int) -> float:
        """The learning rate of `step`, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if self.kind == "cosine":
            share = (step - self.warmup) / max(1, self.steps - self.warmup)
            height = 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
        else:
            falling = max(1.0, self.decay * self.steps)
            height = min(1.0, max(0.0, (self.steps - step) / falling))
        return self.peak * (self.final + (1.0 - self.final) * height)

"""The cases of `linear_scan` in the table of `verification.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.scan.record import state_dtype
from resformer_kernels.testing.problems import Problem

_NAMES = ("states", "final_state", "dgates", "dtokens", "dinitial_state")


@dataclass(frozen=True)
class ScanCase:
    """A scan with an initial state, and gradients of both outputs."""

    name: str
    dtype: torch.dtype
    constant: bool = False
    """Whether the gates are the same at every step."""
    packed: bool = False
    reverse: bool = False
    batch: int = 2
    time: int = 37
    channels: int = 50

    def problem(self, device: str) -> Problem:
        """Gates, tokens and initial state. The terms of a tensor are those of the scan of all
        moduli."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.complex64 if self.dtype.is_complex else torch.float32

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=drawn)

        rows = (self.batch * self.time,) if self.packed else (self.batch, self.time)
        tokens, initial = normal(*rows, self.channels), normal(self.batch, self.channels)
        gates = normal(self.channels) if self.constant else normal(*rows, self.channels)
        gates = gates / (0.1 + gates.abs())
        options: dict[str, Any] = {"reverse": self.reverse}
        if self.packed:
            cu_seqlens = torch.tensor([0, self.time // 3, tokens.shape[0]], dtype=torch.int32)
            options["cu_seqlens"] = cu_seqlens.to(device)
        generator.manual_seed(1)
        grads = [
            torch.randn(tokens.shape, generator=generator).to(device, self.dtype),
            torch.randn(initial.shape, generator=generator).to(device, state_dtype(self.dtype)),
        ]
        return Problem(
            [x.to(device, self.dtype) for x in (gates, tokens, initial)],
            lambda leaves: (leaves, options),
            grads,
            _NAMES,
            lambda leaves, grads: (_moduli(leaves), _moduli(grads)),
        )


def _moduli(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.abs().to(x.dtype) for x in tensors]


def scan_cases(dtype: torch.dtype) -> list[ScanCase]:
    """Gates by step and constant ones; the complex ones stand with float32."""
    cases = [
        ScanCase("gates by step", dtype),
        ScanCase("constant gates, reversed", dtype, constant=True, reverse=True),
        ScanCase("packed", dtype, packed=True),
    ]
    if dtype is torch.float32:
        cases += [
            ScanCase("complex gates by step", torch.complex64),
            ScanCase("complex constant gates", torch.complex64, constant=True),
        ]
    return cases

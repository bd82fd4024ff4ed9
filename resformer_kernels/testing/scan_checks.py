"""The cases of `linear_scan` in the table of `verification.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.scan import linear_scan
from resformer_kernels.scan.record import state_dtype
from resformer_kernels.testing.budgets import Comparison
from resformer_kernels.testing.poison import poisoned

_BATCH, _TIME, _CHANNELS = 2, 37, 50
_NAMES = ("states", "final_state", "dgates", "dtokens", "dinitial_state")


@dataclass(frozen=True)
class ScanCase:
    """A scan with an initial state, and gradients of both outputs."""

    name: str
    dtype: torch.dtype
    constant: bool = False
    """Gates that no time changes."""
    packed: bool = False
    reverse: bool = False
    device: str = "cpu"

    def arguments(self) -> tuple[list[Tensor], dict[str, Any]]:
        """(gates, tokens and initial state; the other arguments)."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.complex64 if self.dtype.is_complex else torch.float32

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=drawn)

        rows = (_BATCH * _TIME,) if self.packed else (_BATCH, _TIME)
        tokens, initial = normal(*rows, _CHANNELS), normal(_BATCH, _CHANNELS)
        gates = normal(_CHANNELS) if self.constant else normal(*rows, _CHANNELS)
        gates = gates / (0.1 + gates.abs())
        options: dict[str, Any] = {"reverse": self.reverse}
        if self.packed:
            cu_seqlens = torch.tensor([0, _TIME // 3, tokens.shape[0]], dtype=torch.int32)
            options["cu_seqlens"] = cu_seqlens.to(self.device)
        leaves = [x.to(self.device, self.dtype) for x in (gates, tokens, initial)]
        return leaves, options

    def compare(self, backend: str) -> list[Comparison]:
        """Every output and gradient against float64. The terms of a tensor, which set its budget
        beside the error of the reference, are those of the scan of all moduli."""
        leaves, options = self.arguments()
        generator = torch.Generator().manual_seed(1)
        grads = [
            torch.randn(x.shape, generator=generator).to(self.device, dtype)
            for x, dtype in ((leaves[1], self.dtype), (leaves[2], state_dtype(self.dtype)))
        ]
        wide = torch.complex128 if self.dtype.is_complex else torch.float64

        def outcome(backend: str, change: Any) -> list[Tensor]:
            given = [change(x).detach().requires_grad_() for x in leaves]
            outputs = linear_scan(*given, **options, backend=backend)
            found = torch.autograd.grad(outputs, given, [change(x) for x in grads])
            return [*(x.detach() for x in outputs), *found]

        with poisoned():
            got = outcome(backend, lambda x: x)
        near = outcome("reference", lambda x: x)
        exact = outcome("reference", lambda x: x.to(wide))
        terms = outcome("reference", lambda x: x.to(wide).abs().to(wide))
        part = torch.float32 if self.dtype.is_complex else self.dtype
        unit = torch.finfo(part).eps / 2
        found = []
        for name, mine, same, true, sums in zip(_NAMES, got, near, exact, terms, strict=True):
            budget = 2 * _distance(same, true) + unit * float(sums.norm())
            found.append(Comparison(name, _distance(mine, true), budget, float(true.norm())))
        return found


def scan_cases(dtype: torch.dtype, device: str) -> list[ScanCase]:
    """Gates by step and constant ones; the complex ones stand with float32."""
    cases = [
        ScanCase("gates by step", dtype, device=device),
        ScanCase("constant gates, reversed", dtype, constant=True, reverse=True, device=device),
        ScanCase("packed", dtype, packed=True, device=device),
    ]
    if dtype is torch.float32:
        cases += [
            ScanCase("complex gates by step", torch.complex64, device=device),
            ScanCase("complex constant gates", torch.complex64, constant=True, device=device),
        ]
    return cases


def _distance(got: Tensor, true: Tensor) -> float:
    error = float((got.to(true.dtype) - true).norm())
    return error if error == error else float("inf")

"""The cases of `reservoir_scan` in the table of `verification.py`, beside those of its modes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.reservoir import RingWeight, reservoir_scan

_UNITS, _BATCH, _TIME, _INPUTS = 48, 2, 40, 3
NAMES = ("dinputs", "dweight", "dinput_weight", "dleak", "dbias", "dinitial_state")
"""Of the gradients, in the order of `ReservoirCase.leaves`."""


@dataclass(frozen=True)
class ReservoirCase:
    """A form of the weight or of the call, with gradients of everything."""

    name: str
    dtype: torch.dtype
    """Of the inputs."""
    kind: str = "dense"
    packed: bool = False
    stored: torch.dtype = torch.float32
    """Of the weight."""
    reduce: str = "none"
    activation: str = "tanh"
    units: int = _UNITS
    device: str = "cpu"

    def leaves(self) -> list[Tensor]:
        """Inputs, weight, input weight, leak, bias and initial state."""
        generator = torch.Generator().manual_seed(11)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        rows = (_BATCH * _TIME,) if self.packed else (_BATCH, _TIME)
        inputs = normal(*rows, _INPUTS).to(self.dtype)
        units = self.units
        dense = normal(units, units) * (_UNITS / units) ** 0.5 / 8
        weight = normal(units) / 2 if self.kind in ("diagonal", "permutation") else dense
        leak = (torch.rand(units, generator=generator) * 0.8 + 0.2).to(self.device)
        rest = [normal(units, _INPUTS), leak, normal(units), normal(_BATCH, units)]
        return [inputs, weight.to(self.stored), *rest]

    def call(self, leaves: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `reservoir_scan` is given."""
        inputs, weight, *rest = leaves
        given: Any = weight
        if self.kind == "permutation":
            order = torch.Generator().manual_seed(5)
            source = torch.randperm(self.units, generator=order).to(self.device)
            given = RingWeight(weight, source)
        elif self.kind == "csr":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
                given = (weight * (weight.abs() > 0.15)).to_sparse_csr()
        options: dict[str, Any] = {"reduce": self.reduce, "activation": self.activation}
        if self.packed:
            cuts = torch.tensor([0, _TIME // 3, inputs.shape[0]], dtype=torch.int32)
            options["cu_seqlens"] = cuts.to(self.device)
        names = ("input_weight", "leak", "bias", "initial_state")
        return (inputs, given), {**dict(zip(names, rest, strict=True)), **options}

    def scan(self, leaves: list[Tensor], backend: str) -> Tensor:
        """The states, or what stands for them."""
        given, named = self.call(leaves)
        states: Tensor = reservoir_scan(*given, **named, backend=backend)[0]
        return states

    def grad(self) -> Tensor:
        """A gradient of `scan`'s result."""
        rows = (_BATCH,) if self.reduce == "last" else (_BATCH, _TIME)
        shape = (_BATCH * _TIME, self.units) if self.packed else (*rows, self.units)
        return torch.randn(shape, generator=torch.Generator().manual_seed(12)).to(self.device)


def reservoir_cases(dtype: torch.dtype, device: str) -> Iterator[ReservoirCase]:
    """The forms of the weight that the modes' cases leave out; inputs of 16 bits are widened once,
    so that one form of each says enough."""
    yield ReservoirCase("sparse", dtype, "csr", device=device)
    if dtype is not torch.float32:
        return
    yield ReservoirCase("diagonal, relu", dtype, "diagonal", activation="relu", device=device)
    yield ReservoirCase("permutation, packed", dtype, "permutation", packed=True, device=device)
    yield ReservoirCase("last state", dtype, reduce="last", device=device)
    yield ReservoirCase("bfloat16 weight", dtype, stored=torch.bfloat16, device=device)
    # More than one multiprocessor's memory holds, where W is kept on the chip: with a sequence for
    # each team of them, and with two for one team.
    yield ReservoirCase("dense, 320 units, packed", dtype, packed=True, units=320, device=device)
    stored = torch.bfloat16
    yield ReservoirCase(
        "bfloat16 weight, 640 units", dtype, stored=stored, units=640, device=device
    )

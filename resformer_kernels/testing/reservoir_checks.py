"""The cases of `reservoir_scan` in the table of `verification.py`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.reservoir import RingWeight
from resformer_kernels.testing.problems import Arguments, Problem

_UNITS, _BATCH, _INPUTS = 48, 2, 3
_NAMED = ("input_weight", "leak", "bias", "initial_state")
_NAMES = ("out", "dinputs", "dweight", *(f"d{name}" for name in _NAMED))


@dataclass(frozen=True)
class ReservoirCase:
    """A form of the weight or of the call, with gradients of everything."""

    name: str
    dtype: torch.dtype
    """Dtype of the inputs."""
    kind: str = "dense"
    packed: bool = False
    stored: torch.dtype = torch.float32
    """Dtype of the weight."""
    reduce: str = "none"
    activation: str = "tanh"
    units: int = _UNITS
    time: int = 40
    mode: str = "auto"

    def problem(self, device: str) -> Problem:
        """Inputs, weight, input weight, leak, bias and initial state, and a gradient of what
        stands for the states."""
        generator = torch.Generator().manual_seed(11)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        rows = (_BATCH * self.time,) if self.packed else (_BATCH, self.time)
        inputs = normal(*rows, _INPUTS).to(self.dtype)
        units = self.units
        dense = normal(units, units) * (_UNITS / units) ** 0.5 / 8
        weight = normal(units) / 2 if self.kind in ("diagonal", "permutation") else dense
        leak = (torch.rand(units, generator=generator) * 0.8 + 0.2).to(device)
        rest = [normal(units, _INPUTS), leak, normal(units), normal(_BATCH, units)]
        generator.manual_seed(12)
        grad = normal(*((_BATCH,) if self.reduce == "last" else rows), units)
        leaves = [inputs, weight.to(self.stored), *rest]
        return Problem(leaves, self._arguments, [grad], _NAMES, lambda *wide: wide)

    def _arguments(self, leaves: Sequence[Tensor]) -> Arguments:
        inputs, weight, *rest = leaves
        given: Any = weight
        if self.kind == "permutation":
            order = torch.Generator().manual_seed(5)
            given = RingWeight(
                weight, torch.randperm(self.units, generator=order).to(weight.device)
            )
        elif self.kind == "csr":
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
                given = (weight * (weight.abs() > 0.15)).to_sparse_csr()
        options: dict[str, Any] = {"reduce": self.reduce, "activation": self.activation}
        options["mode"] = self.mode
        if self.packed:
            offsets = torch.tensor([0, self.time // 3, inputs.shape[0]], dtype=torch.int32)
            options["cu_seqlens"] = offsets.to(inputs.device)
        return (inputs, given), {**dict(zip(_NAMED, rest, strict=True)), **options}


def reservoir_cases(dtype: torch.dtype) -> Iterator[ReservoirCase]:
    """The forms of the weight that the modes' cases leave out; inputs of 16 bits are widened once,
    so that one form of each says enough."""
    yield ReservoirCase("sparse", dtype, "csr")
    if dtype is not torch.float32:
        return
    yield ReservoirCase("diagonal, relu", dtype, "diagonal", activation="relu")
    yield ReservoirCase("permutation, sigmoid", dtype, "permutation", activation="sigmoid")
    yield ReservoirCase("dense, softplus", dtype, activation="softplus")
    yield ReservoirCase("permutation, packed", dtype, "permutation", packed=True)
    yield ReservoirCase("last state", dtype, reduce="last")
    yield ReservoirCase("bfloat16 weight", dtype, stored=torch.bfloat16)
    # More than one multiprocessor's memory holds, where W is kept on the chip: with a sequence for
    # each team of them, and with two for one team.
    yield ReservoirCase("dense, 320 units, packed", dtype, packed=True, units=320)
    yield ReservoirCase("bfloat16 weight, 640 units", dtype, stored=torch.bfloat16, units=640)


MODES = (
    *((kind, "auto") for kind in ("dense", "groups", "ring")),
    *(("dense", mode) for mode in ("sequential", "chunked")),
)
"""Kinds of the weight, and the modes that step through it."""


def mode_problem(kind: str, mode: str, device: str) -> Problem:
    """48 units with a weight of one kind, in one mode."""
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    shape, divisor = {"dense": ((48, 48), 8), "groups": ((3, 16, 16), 5), "ring": ((48,), 2)}[kind]
    weight = normal(*shape) / divisor
    leak = (torch.rand(48, generator=generator) * 0.8 + 0.2).to(device)
    leaves = [normal(2, 60, 3), weight, normal(48, 3), leak, normal(48), normal(2, 48)]

    def arguments(leaves: Sequence[Tensor]) -> Arguments:
        inputs, weight, *rest = leaves
        given = RingWeight(weight) if kind == "ring" else weight
        return (inputs, given), {**dict(zip(_NAMED, rest, strict=True)), "mode": mode}

    return Problem(leaves, arguments, [normal(2, 60, 48)], _NAMES, lambda *wide: wide)

"""The reservoirs that reservoir_tasks.py compares: this package's and ReservoirPy's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.nn import Reservoir

OURS = "here"
STRENGTHS = (1e-10, 1e-8, 1e-6, 1e-4)
"""Strengths of a ridge readout; one is chosen on held-out rows."""
EXAMPLE: Mapping[str, float] = {"lr": 0.3, "sr": 1.1}
"""Settings of ReservoirPy's first example; all others are its defaults."""
EXAMPLE_STRENGTH = 1e-6
"""Strength of the ridge readout of that example."""

Settings = Mapping[str, float]
"""Arguments of `nn.Reservoir`, under ReservoirPy's names."""


class Kernels:
    """An `nn.Reservoir`: float32 uses the kernels, float64 the reference."""

    def __init__(self, reservoir: Reservoir, dtype: torch.dtype, fold: bool = False) -> None:
        self.reservoir, self.fold = reservoir.to(dtype), fold
        # Only the reference takes float64; "auto" would warn that it is slow.
        self.reservoir.backend = "reference" if dtype is torch.float64 else "auto"

    def states(self, inputs: Tensor) -> Tensor:
        """(T, N) of inputs (T, n_in)."""
        states, _ = self.reservoir(inputs[None].to(self.reservoir.leak.dtype))
        assert isinstance(states, Tensor)
        return states[0]

    def free_run(self, readout: Callable[[Tensor], Tensor], state: Tensor, steps: int) -> Tensor:
        """Outputs (B, steps, n_in), each fed back, from states (B, N)."""
        return self.reservoir.free_run(readout, state, steps, fold=self.fold)[0]


class PeerReservoir:
    """A `reservoirpy.nodes.Reservoir`: float64, a tenth of the weights nonzero, step by step."""

    def __init__(self, units: int, inputs: int, seed: int, options: Mapping[str, Any]) -> None:
        from reservoirpy.nodes import Reservoir as Node

        self.node = Node(units=units, seed=seed, **options)
        self.node.initialize(torch.zeros(2, inputs).numpy())

    def states(self, inputs: Tensor) -> Tensor:
        """(T, N) of inputs (T, n_in)."""
        return torch.from_numpy(self.node.run(inputs.double().numpy()))

    def free_run(self, readout: Callable[[Tensor], Tensor], state: Tensor, steps: int) -> Tensor:
        """Outputs (B, steps, n_in), each fed back, from states (B, N): all starts at once."""
        node, h, outputs = self.node, state.numpy().T, []
        bias = torch.as_tensor(node.bias).reshape(-1, 1).numpy()
        for _ in range(steps):
            outputs.append(readout(torch.from_numpy(h.T)))
            drive = node.Win @ outputs[-1].numpy().T
            h = (1 - node.lr) * h + node.lr * node.activation(node.W @ h + drive + bias)
        return torch.stack(outputs, 1)


Network = Kernels | PeerReservoir


@dataclass(frozen=True)
class Contender:
    """One implementation in the comparison.

    Attributes:
        name: the heading of its column.
        make: makes a network from (units, inputs, seed, settings).
        strengths: the candidate strengths of its readouts.
        dtype: dtype of its states.
    """

    name: str
    make: Callable[[int, int, int, Settings], Network]
    strengths: Sequence[float] = STRENGTHS
    dtype: torch.dtype = torch.float64


def ours(dtype: torch.dtype, fold: bool) -> Contender:
    """The reservoirs of this package; with `fold`, forecasts run in one scan."""

    def make(units: int, inputs: int, seed: int, settings: Settings) -> Network:
        options: dict[str, Any] = {"input_connectivity": 1.0, **settings}
        return Kernels(Reservoir(units, inputs, seed=seed, **options), dtype, fold)

    return Contender(OURS, make, dtype=dtype)


def reservoirpy() -> list[Contender]:
    """ReservoirPy's, with the settings of its first example, and with those given.

    Raises:
        ModuleNotFoundError: ReservoirPy is not installed.
    """
    if importlib.util.find_spec("reservoirpy") is None:
        raise ModuleNotFoundError(
            "ReservoirPy is not installed: pip install 'resformer-kernels[bench]'"
        )

    def example(units: int, inputs: int, seed: int, _settings: Settings) -> Network:
        return PeerReservoir(units, inputs, seed, EXAMPLE)

    def same(units: int, inputs: int, seed: int, settings: Settings) -> Network:
        from reservoirpy import mat_gen

        options: dict[str, Any] = {"input_connectivity": 1.0, **settings}
        # ReservoirPy cannot scale the bias alone: draw it from ReservoirPy's distribution.
        options["bias"] = options.pop("bias_scaling") * mat_gen.bernoulli(units, seed=seed)
        return PeerReservoir(units, inputs, seed, options)

    return [
        Contender("ReservoirPy, as it comes", example, (EXAMPLE_STRENGTH,)),
        Contender("ReservoirPy, settings as here", same),
    ]

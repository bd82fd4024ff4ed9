"""Reservoirs to time: ours against a loop of torch ops, `torch.nn.RNN` and ReservoirPy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.reservoir import reservoir_scan
from resformer_kernels.testing.timing import OURS
from resformer_kernels.testing.workloads import Call, require_kernel

_LEAK, _RADIUS = 0.3, 0.9
_CONNECTIVITY = 0.1
"""ReservoirPy's default."""


@dataclass(frozen=True)
class ReservoirBenchmark:
    """One input, N tanh units, every state, from noise: leak 0.3 and spectral radius 0.9, but for
    `nn.RNN`, which knows no leak."""

    units: int
    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    """Of the weights; states are float32."""
    sparse: bool = False
    """A tenth of the weights, as CSR; ReservoirPy is then a peer where it is installed."""
    group: str = "reservoir"
    mode: str = "auto"
    """Of ours."""
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Form, shape and dtype of the weights; the mode where it was asked for."""
        form = "sparse" if self.sparse else "dense"
        dtype = str(self.dtype).removeprefix("torch.")
        mode = "" if self.mode == "auto" else f" {self.mode}"
        return f"reservoir_scan {form} B{self.batch} T{self.length} N{self.units}{mode} {dtype}"

    @property
    def flops(self) -> int:
        """Of the products with the weights, each step once."""
        stored = self.units**2 * (_CONNECTIVITY if self.sparse else 1)
        return int(2 * stored * self.batch * self.length)

    @property
    def bytes(self) -> int:
        """The states and the input, 4 bytes each."""
        return 4 * self.batch * self.length * (self.units + 1)

    def contestants(self) -> dict[str, Call]:
        """Ours, and what else steps through such a reservoir."""
        return {name: make() for name, make in self.makers().items()}

    def makers(self) -> dict[str, Callable[[], Call]]:
        """What makes each contestant; ours is `Unavailable` where no kernel serves it."""
        weight = torch.randn(self.units, self.units) * _RADIUS / self.units**0.5
        if self.sparse:
            weight *= (torch.rand_like(weight) < _CONNECTIVITY) / _CONNECTIVITY**0.5
        inputs = torch.randn(self.batch, self.length, 1).to(self.device)
        projection = (torch.rand(self.units, 1) * 2 - 1).to(self.device)
        given = (weight.to_sparse_csr() if self.sparse else weight).to(self.device, self.dtype)
        weight = weight.to(self.device)
        options: dict[str, Any] = {
            "input_weight": projection,
            "leak": _LEAK,
            "mode": self.mode,
        }

        def ours() -> Call:
            if self.device != "cpu":
                require_kernel(reservoir_scan, inputs, given, **options)

            @torch.no_grad()
            def scan() -> object:
                return reservoir_scan(inputs, given, **options)

            return scan

        def rnn() -> Call:
            recurrent = torch.nn.RNN(1, self.units, batch_first=True).to(self.device)
            return lambda: _without_gradient(recurrent, inputs)

        found: dict[str, Callable[[], Call]] = {
            OURS: ours,
            "torch loop": lambda: partial(_loop, inputs, weight, projection),
            "nn.RNN": rnn,
        }
        on_cpu = self.device == "cpu"
        if self.sparse and self.batch == 1 and on_cpu and importlib.util.find_spec("reservoirpy"):
            found["ReservoirPy"] = lambda: self._reservoirpy(inputs)
        return found

    def _reservoirpy(self, inputs: Tensor) -> Call:
        from reservoirpy.nodes import Reservoir

        node = Reservoir(units=self.units, lr=_LEAK, sr=_RADIUS, seed=0)
        steps = inputs[0].double().numpy()
        return lambda: node.run(steps)


@torch.no_grad()
def _without_gradient(function: Callable[[Tensor], object], inputs: Tensor) -> object:
    return function(inputs)


@torch.no_grad()
def _loop(inputs: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    """The quickest loop we know: one addmm, one tanh and one lerp a step, none of which allocates
    but the lerp."""
    drive = (inputs @ projection.T).transpose(0, 1).contiguous()
    transposed = weight.t().contiguous()
    out = torch.empty_like(drive)
    state = drive.new_zeros(drive.shape[1:])
    z = torch.empty_like(state)
    for t in range(drive.shape[0]):
        torch.addmm(drive[t], state, transposed, out=z)
        z.tanh_()
        state = torch.lerp(state, z, _LEAK)
        out[t] = state
    return out

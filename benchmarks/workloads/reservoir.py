"""Reservoirs to time: ours against a loop of torch ops, `torch.nn.RNN` and ReservoirPy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.bench.timing import OURS, Call, Unavailable
from resformer_kernels.bench.workloads import require_kernel, require_package, timed_call
from resformer_kernels.reservoir import reservoir_scan

_LEAK, _RADIUS = 0.3, 0.9
_CONNECTIVITY = 0.1
"""ReservoirPy's default."""

LOOP, RNN, RESERVOIRPY = "torch loop", "nn.RNN", "ReservoirPy"
WIDE = "ours, float32 weights"
CUDA = "ours, CUDA C++"
"""Step after step, beside what "auto" takes on a GPU."""


@dataclass(frozen=True)
class ReservoirBenchmark:
    """One input, N tanh units, every state, from noise: leak 0.3 and spectral radius 0.9, but for
    `nn.RNN`, which knows no leak. ReservoirPy always has its default, a tenth of the weights."""

    units: int
    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    """Of the weights, the states being float32; bfloat16 is held against float32 weights alone."""
    sparse: bool = False
    """A tenth of the weights, as CSR."""
    direction: str = "forward"
    """"forward" or "backward": the gradients of input, weights and input weights."""
    group: str = "reservoir"
    mode: str = "auto"
    """Of ours."""
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Form, shape and dtype of the weights; the mode where it was asked for."""
        form = "sparse" if self.sparse else "dense"
        dtype = str(self.dtype).removeprefix("torch.")
        direction = "" if self.direction == "forward" else f"{self.direction} "
        mode = "" if self.mode == "auto" else f" {self.mode}"
        shape = f"B{self.batch} T{self.length} N{self.units}"
        return f"reservoir_scan {direction}{form} {shape}{mode} {dtype}"

    @property
    def flops(self) -> int:
        """Of the products with the weights, each step once."""
        stored = self.units**2 * (_CONNECTIVITY if self.sparse else 1)
        # A backward multiplies by the weights and sums an outer product.
        passes = 1 if self.direction == "forward" else 2
        return int(2 * passes * stored * self.batch * self.length)

    @property
    def bytes(self) -> int:
        """The states and the input, 4 bytes each; backward: their gradients too."""
        passes = 1 if self.direction == "forward" else 2
        return 4 * passes * self.batch * self.length * (self.units + 1)

    def makers(self) -> dict[str, Callable[[], Call]]:
        """Ours, and what else steps through such a reservoir, all on the same weights; ours is
        `Unavailable` on a GPU where no kernel serves it."""
        ours: dict[str, Callable[[], Call]] = {OURS: lambda: self._ours(self.dtype)}
        if self.device != "cpu" and self.mode != "chunked":
            ours[CUDA] = lambda: self._ours(self.dtype, "native")
        if self.dtype is not torch.float32:
            # The peers of the float32 case have no narrower form that were quicker.
            return {**ours, WIDE: self._ours}
        return {**ours, LOOP: self._loop, RNN: self._rnn, RESERVOIRPY: self._reservoirpy}

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """inputs (B, T, 1), weight (N, N), input_weight (N, 1), the same at every call."""
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(self.batch, self.length, 1, generator=generator)
        weight = torch.randn(self.units, self.units, generator=generator)
        weight *= _RADIUS / self.units**0.5
        if self.sparse:
            kept = torch.rand(weight.shape, generator=generator) < _CONNECTIVITY
            weight *= kept / _CONNECTIVITY**0.5
        projection = torch.rand(self.units, 1, generator=generator) * 2 - 1
        return inputs.to(self.device), weight.to(self.device), projection.to(self.device)

    def _ours(self, dtype: torch.dtype = torch.float32, backend: str = "auto") -> Call:
        inputs, weight, projection = self._tensors()
        given = (weight.to_sparse_csr() if self.sparse else weight).to(dtype)
        options: dict[str, Any] = {"input_weight": projection, "leak": _LEAK, "mode": self.mode}
        options["backend"] = backend
        if self.device != "cpu":
            require_kernel(reservoir_scan, inputs, given, **options)
        return timed_call(
            lambda: reservoir_scan(inputs, given, **options)[0],
            [inputs, given, projection],
            self.direction,
        )

    def _loop(self) -> Call:
        inputs, weight, projection = self._tensors()
        if self.direction == "forward":
            return lambda: _loop(inputs, weight, projection)
        leaves = [inputs, weight, projection]
        return timed_call(lambda: _plain_loop(*leaves), leaves, self.direction)

    def _rnn(self) -> Call:
        if self.sparse:
            raise Unavailable("has dense weights only")
        inputs, _, _ = self._tensors()
        recurrent = torch.nn.RNN(1, self.units, batch_first=True).to(self.device)
        leaves = [inputs, *recurrent.parameters()]
        return timed_call(lambda: recurrent(inputs)[0], leaves, self.direction)

    def _reservoirpy(self) -> Call:
        require_package("reservoirpy")
        if self.direction == "backward":
            raise Unavailable("has no gradients")
        if self.batch > 1:
            raise Unavailable("runs one sequence at a time")
        if self.device != "cpu":
            raise Unavailable("runs on CPUs alone")
        from reservoirpy.nodes import Reservoir

        node = Reservoir(units=self.units, lr=_LEAK, sr=_RADIUS, seed=0)
        steps = self._tensors()[0][0].double().numpy()
        return lambda: node.run(steps)


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


def _plain_loop(inputs: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    """The same with a gradient."""
    state, states = inputs.new_zeros(inputs.shape[0], weight.shape[0]), []
    for drive in (inputs @ projection.T).unbind(1):
        state = torch.lerp(state, torch.addmm(drive, state, weight.t()).tanh(), _LEAK)
        states.append(state)
    return torch.stack(states, 1)

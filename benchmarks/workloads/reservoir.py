"""Reservoirs to time: ours against a loop of torch ops, `torch.nn.RNN`, ReservoirPy and resdag."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads.common import Makers, Workload, require_package
from resformer_kernels.bench.timing import OURS, Call, Unavailable, timed_call
from resformer_kernels.nn import Reservoir
from resformer_kernels.reservoir import reservoir_scan
from resformer_kernels.testing.inputs import dtype_name

_LEAK, _RADIUS = 0.3, 0.9
_CONNECTIVITY = 0.1
"""ReservoirPy's default."""

LOOP, RNN, RESERVOIRPY = "torch loop", "nn.RNN", "ReservoirPy"
LOOP_CSR, JAX, RESDAG = "torch loop, CSR", "ReservoirPy on JAX", "resdag"
WIDE = "ours, float32 weights"
CUDA = "ours, CUDA C++"
"""The step-by-step kernel, beside what "auto" takes on a GPU."""


@dataclass(frozen=True)
class ReservoirBenchmark(Workload):
    """One input channel of noise, N tanh units, every state; leak 0.3 and spectral radius 0.9.

    `nn.RNN` has no leak. ReservoirPy always has its default, a tenth of the weights, in float64:
    it is slower in float32, whose states become float64, and with a dense W. On JAX, and in resdag,
    W is ours, and dense but where the case is sparse and resdag stores CSR.
    """

    units: int
    batch: int
    length: int
    dtype: torch.dtype = torch.float32
    """Dtype of the weights; states are float32. bfloat16's only peer is ours with float32."""
    sparse: bool = False
    """A tenth of the weights, as CSR."""
    direction: str = "forward"
    """"forward" or "backward": the gradients of input, weights and input weights."""
    group: str = "reservoir"
    mode: str = "auto"
    """The mode of ours."""
    device: str = "cpu"
    module: bool = False
    """Ours is `nn.Reservoir`, with a tenth of the weights and its own choice of layout."""

    @property
    def name(self) -> str:
        """Form, shape and dtype of the weights; the mode where it was asked for."""
        if self.module:
            return f"nn.Reservoir B{self.batch} T{self.length} N{self.units} float32"
        form = "sparse" if self.sparse else "dense"
        direction = "" if self.direction == "forward" else f"{self.direction} "
        mode = "" if self.mode == "auto" else f" {self.mode}"
        shape = f"B{self.batch} T{self.length} N{self.units}"
        return f"reservoir_scan {direction}{form} {shape}{mode} {dtype_name(self.dtype)}"

    @property
    def _passes(self) -> int:
        # A backward multiplies by the weights and sums an outer product.
        return 1 if self.direction == "forward" else 2

    @property
    def flops(self) -> int:
        """Operations of the products with the weights, each step once."""
        stored = self.units**2 * (_CONNECTIVITY if self.sparse else 1)
        return int(2 * self._passes * stored * self.batch * self.length)

    @property
    def bytes(self) -> int:
        """The states and the input, 4 bytes each; backward: their gradients too."""
        return 4 * self._passes * self.batch * self.length * (self.units + 1)

    def makers(self) -> Makers:
        """Ours, and what else steps through such a reservoir, all on the same weights."""
        if self.module:
            peers = {LOOP: self._loop, LOOP_CSR: self._loop_csr, RESERVOIRPY: self._reservoirpy}
            return {OURS: self._module, **peers, JAX: self._jax, RESDAG: self._resdag}
        ours: Makers = {OURS: lambda: self._ours(self.dtype)}
        if self.device != "cpu" and self.mode != "chunked":
            ours[CUDA] = lambda: self._ours(self.dtype, "native")
        if self.dtype is not torch.float32:
            # The peers of the float32 case have no narrower form that is quicker.
            return {**ours, WIDE: self._ours}
        if self.sparse:
            ours[LOOP_CSR] = self._loop_csr
        peers = {LOOP: self._loop, RNN: self._rnn, RESERVOIRPY: self._reservoirpy}
        return {**ours, **peers, JAX: self._jax, RESDAG: self._resdag}

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
        options = {"input_weight": projection, "leak": _LEAK, "mode": self.mode, "backend": backend}
        return self.ours(reservoir_scan, (inputs, given), options)

    def _module(self) -> Call:
        if self.direction == "backward":
            raise Unavailable("is timed forward alone")
        made = Reservoir(self.units, 1, lr=_LEAK, sr=_RADIUS, input_connectivity=1.0)
        return self.call(made.to(self.device), self._tensors()[:1])

    def _loop(self) -> Call:
        return self.call(_loop if self.direction == "forward" else _plain_loop, self._tensors())

    def _loop_csr(self) -> Call:
        if self.direction == "backward":
            raise Unavailable("is written for the forward alone")
        inputs, weight, projection = self._tensors()
        return self.call(partial(_loop_csr, weight.to_sparse_csr()), (inputs, projection))

    def _rnn(self, *, batch_first: bool = True) -> Call:
        if self.sparse:
            raise Unavailable("has dense weights only")
        inputs, _, _ = self._tensors()
        inputs = inputs if batch_first else inputs.transpose(0, 1).contiguous()
        recurrent = torch.nn.RNN(1, self.units, batch_first=batch_first).to(self.device)
        leaves = [inputs, *recurrent.parameters()]
        return timed_call(lambda: recurrent(inputs), leaves, self.direction)

    def _reservoirpy(self, dtype: str = "float64", *, dense: bool = False) -> Call:
        require_package("reservoirpy")
        self._require_one_sequence_forward()
        from reservoirpy import nodes

        node = nodes.Reservoir(units=self.units, lr=_LEAK, sr=_RADIUS, seed=0, dtype=dtype)
        steps = self._tensors()[0][0].numpy().astype(dtype)
        if dense:
            node.run(steps[:1])
            node.W = node.W.toarray()
        return lambda: node.run(steps)

    def _jax(self, *, own_sparse: bool = False) -> Call:
        require_package("jax")
        require_package("reservoirpy")
        self._require_one_sequence_forward()
        jnp: Any = importlib.import_module("jax.numpy")
        from reservoirpy.jax import nodes

        inputs, weight, projection = (jnp.asarray(x.numpy()) for x in self._tensors())
        given: dict[str, Any] = {} if own_sparse else {"W": weight, "Win": projection}
        node = nodes.Reservoir(self.units, lr=_LEAK, sr=_RADIUS, seed=0, dtype=jnp.float32, **given)
        return lambda: node.run(inputs[0]).block_until_ready()

    def _resdag(self, *, sparse: bool | None = None) -> Call:
        require_package("resdag")
        if self.direction == "backward":
            raise Unavailable("its reservoirs are frozen")
        layers: Any = importlib.import_module("resdag.layers")
        inputs, weight, projection = self._tensors()
        layer = layers.ESNLayer(
            *(self.units, 1),
            leak_rate=_LEAK,
            bias=False,
            sparse=self.sparse if sparse is None else sparse,
            topology=lambda *_: weight.cpu().numpy(),
            feedback_initializer=lambda *_: projection.cpu().numpy(),
        ).to(self.device)

        @torch.no_grad()
        def run() -> Tensor:
            layer.reset_state()
            states: Tensor = layer(inputs)
            return states

        return run

    def _require_one_sequence_forward(self) -> None:
        for limit, reason in (
            (self.direction == "backward", "has no gradients"),
            (self.batch > 1, "runs one sequence at a time"),
            (self.device != "cpu", "runs on CPUs alone"),
        ):
            if limit:
                raise Unavailable(reason)


@torch.no_grad()
def _loop(inputs: Tensor, weight: Tensor, projection: Tensor) -> Tensor:
    """The quickest loop we know: an addmm, a tanh and a lerp a step; only the lerp allocates."""
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
    """The recurrence of `_loop`, differentiable."""
    state, states = inputs.new_zeros(inputs.shape[0], weight.shape[0]), []
    for drive in (inputs @ projection.T).unbind(1):
        state = torch.lerp(state, torch.addmm(drive, state, weight.t()).tanh(), _LEAK)
        states.append(state)
    return torch.stack(states, 1)


@torch.no_grad()
def _loop_csr(weight: Tensor, inputs: Tensor, projection: Tensor) -> Tensor:
    """`_loop` with W as CSR: states are columns, as torch's sparse products want them."""
    drive = (inputs @ projection.T).permute(1, 2, 0).contiguous()
    out = torch.empty_like(drive)
    state = drive.new_zeros(drive.shape[1:])
    for t in range(drive.shape[0]):
        z = torch.addmm(drive[t], weight, state).tanh_()
        state = torch.lerp(state, z, _LEAK)
        out[t] = state
    return out

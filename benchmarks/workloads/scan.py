"""Scans to time, beside a loop, torch's parallel scan, packages for GPUs, and a copy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.workloads.common import Makers, Workload, require_package
from resformer_kernels.bench.timing import OURS, Call, Unavailable
from resformer_kernels.scan import linear_scan
from resformer_kernels.testing.inputs import dtype_name

LOOP, ASSOCIATIVE, COPY = "Python loop", "associative_scan", "copy of as many bytes"
FLA, ACCELERATED = "fla", "accelerated-scan"
PEERS = (LOOP, ASSOCIATIVE, FLA, ACCELERATED)

_MOST_ASSOCIATED = 2**23
"""Elements that torch's parallel scan takes about a second for on two cores."""
_CUDA_PACKAGES = {FLA: "fla", ACCELERATED: "accelerated_scan"}


def scan_by_loop(gates: Tensor, tokens: Tensor) -> Tensor:
    """The recurrence, a step of all channels at a time; without gradients in place, which saves a
    sixth."""
    by_step = [gates] * tokens.shape[1] if gates.dim() == 1 else gates.unbind(1)
    if torch.is_grad_enabled() and (gates.requires_grad or tokens.requires_grad):
        state, states = torch.zeros_like(tokens[:, 0]), []
        for gate, token in zip(by_step, tokens.unbind(1), strict=True):
            state = torch.addcmul(token, gate, state)
            states.append(state)
        return torch.stack(states, 1)
    out = torch.empty_like(tokens)
    before = torch.zeros_like(tokens[:, 0])
    for gate, token, state in zip(by_step, tokens.unbind(1), out.unbind(1), strict=True):
        torch.addcmul(token, gate, before, out=state)
        before = state
    return out


def scan_by_association(gates: Tensor, tokens: Tensor, dim: int = 1) -> Tensor:
    """torch's own parallel scan, over the axis `dim`."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: Any, right: Any) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    every = gates.expand(tokens.shape)
    _, states = associative_scan(combine, (every, tokens), dim=dim, combine_mode="generic")
    found: Tensor = states
    return found


def scan_by_fla(gates: Tensor, tokens: Tensor) -> Tensor:
    """flash-linear-attention's chunked HGRN, which takes logarithms of gates."""
    from fla.ops.hgrn import chunk_hgrn

    states: Tensor = chunk_hgrn(tokens, gates.expand(tokens.shape).log())[0]
    return states


def scan_by_acceleration(gates: Tensor, tokens: Tensor) -> Tensor:
    """accelerated-scan's kernel, on tensors with time last, (B, N, T)."""
    from accelerated_scan.warp import scan

    states: Tensor = scan(gates, tokens)
    return states


def time_last(gates: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Both as contiguous (B, N, T), the layout of users whose time is last."""
    gates, tokens = (x.transpose(1, 2).contiguous() for x in (gates.expand(tokens.shape), tokens))
    return gates, tokens


_SCANS = {
    LOOP: scan_by_loop,
    ASSOCIATIVE: scan_by_association,
    FLA: scan_by_fla,
    ACCELERATED: scan_by_acceleration,
}


@dataclass(frozen=True)
class ScanBenchmark(Workload):
    """`linear_scan` from a state of zero; gates in (0, 1), or complex of modulus below 1."""

    batch: int
    length: int
    channels: int
    dtype: torch.dtype
    direction: str
    """"forward" or "backward"."""
    constant: bool = False
    """Whether the gates are the same at every step."""
    peers: tuple[str, ...] = (LOOP,)
    device: str = "cpu"
    flops: int = 0
    """A scan is bound by memory: bytes count."""

    group: ClassVar[str] = "scan"

    @property
    def name(self) -> str:
        """Direction, shape, gates and dtype."""
        gates = "constant gates" if self.constant else "gates by step"
        shape = f"B{self.batch} T{self.length} N{self.channels}"
        against = " against copy" if COPY in self.peers else ""
        return f"linear_scan {self.direction} {shape} {gates} {dtype_name(self.dtype)}{against}"

    @property
    def bytes(self) -> int:
        """Tokens, states and gates by step; backward: the states' gradient, the states and the
        gates are read, the gradients of tokens and gates written."""
        tensors = {"forward": (3, 2), "backward": (5, 3)}[self.direction][self.constant]
        return tensors * self.batch * self.length * self.channels * self.dtype.itemsize

    def makers(self) -> Makers:
        """Ours, and each of `peers`."""
        return {
            OURS: lambda: self.ours(linear_scan, self.arguments()),
            **{name: partial(self._peer, name) for name in self.peers},
        }

    def _peer(self, name: str) -> Call:
        if name == COPY:
            # Half of the bytes are read and half of them written.
            source = torch.ones(self.bytes // 8, device=self.device)
            target = torch.empty_like(source)
            return lambda: target.copy_(source)
        if name == ASSOCIATIVE:
            if self.direction == "backward":
                raise Unavailable("takes minutes: autograd goes through each of its slices")
            if self.batch * self.length * self.channels > _MOST_ASSOCIATED:
                raise Unavailable("takes many seconds a call at this size")
        if name in _CUDA_PACKAGES:
            module = _CUDA_PACKAGES[name]
            require_package(module)
            if torch.device(self.device).type != "cuda":
                raise Unavailable(f"{module} runs on CUDA tensors alone")
            if self.dtype.is_complex:
                raise Unavailable(f"{module} knows no complex numbers")
        given = self.arguments()
        return self.call(_SCANS[name], time_last(*given) if name == ACCELERATED else given)

    def arguments(self) -> tuple[Tensor, Tensor]:
        """Gates and tokens."""
        shape = (self.batch, self.length, self.channels)
        drawn = torch.complex64 if self.dtype.is_complex else torch.float32
        tokens = torch.randn(shape, dtype=drawn).to(self.device, self.dtype)
        gates = torch.rand(shape[-1:] if self.constant else shape)
        if self.dtype.is_complex:
            gates = torch.polar(gates, 6.28 * torch.rand(gates.shape))
        return gates.to(self.device, self.dtype), tokens

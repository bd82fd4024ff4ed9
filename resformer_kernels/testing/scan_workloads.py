"""Scans to time, as data: inputs, bytes, and how ours and each peer would do them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resformer_kernels.scan import linear_scan
from resformer_kernels.testing.timing import OURS
from resformer_kernels.testing.workloads import Call, require_kernel, timed_call

LOOP, ASSOCIATIVE, COPY = "Python loop", "associative_scan", "copy of as many bytes"


@dataclass(frozen=True)
class ScanBenchmark:
    """`linear_scan` from a state of zero; gates in (0, 1), or complex of modulus below 1."""

    batch: int
    length: int
    channels: int
    dtype: torch.dtype
    direction: str
    """"forward" or "backward"."""
    constant: bool = False
    """Gates that no time changes."""
    peers: tuple[str, ...] = (LOOP,)
    device: str = "cpu"
    flops: int = 0
    """A scan is bound by memory: bytes count."""

    @property
    def name(self) -> str:
        """Direction, shape, gates and dtype."""
        gates = "constant gates" if self.constant else "gates by step"
        shape = f"B{self.batch} T{self.length} N{self.channels}"
        dtype = str(self.dtype).removeprefix("torch.")
        against = " against copy" if COPY in self.peers else ""
        return f"linear_scan {self.direction} {shape} {gates} {dtype}{against}"

    @property
    def group(self) -> str:
        """The same for all scans."""
        return "scan"

    @property
    def bytes(self) -> int:
        """Tokens, states and gates by step; backward: the states' gradient, the states and the
        gates are read, the gradients of tokens and gates written."""
        one = self.batch * self.length * self.channels * self.dtype.itemsize
        if self.direction == "forward":
            return (2 if self.constant else 3) * one
        return (3 if self.constant else 5) * one

    def contestants(self) -> dict[str, Call]:
        """Ours, and each peer, on inputs of its own."""
        return {name: make() for name, make in self.makers().items()}

    def makers(self) -> dict[str, Callable[[], Call]]:
        """What makes each contestant; ours is `Unavailable` where no kernel serves it."""
        scans: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            LOOP: scan_by_loop,
            ASSOCIATIVE: scan_by_association,
        }
        makers: dict[str, Callable[[], Call]] = {OURS: self._ours}
        for name in self.peers:
            makers[name] = self._copy if name == COPY else partial(self._scan, scans[name])
        return makers

    def _ours(self) -> Call:
        gates, tokens = self._arguments()
        if self.device != "cpu":
            require_kernel(linear_scan, gates, tokens)
        return timed_call(lambda: linear_scan(gates, tokens)[0], [gates, tokens], self.direction)

    def _scan(self, scan: Callable[[Tensor, Tensor], Tensor]) -> Call:
        gates, tokens = self._arguments()
        return timed_call(lambda: scan(gates, tokens), [gates, tokens], self.direction)

    def _copy(self) -> Call:
        # Half of the bytes are read and half of them written.
        source = torch.ones(self.bytes // 8, device=self.device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    def _arguments(self) -> tuple[Tensor, Tensor]:
        shape = (self.batch, self.length, self.channels)
        drawn = torch.complex64 if self.dtype.is_complex else torch.float32
        tokens = torch.randn(shape, dtype=drawn).to(self.device, self.dtype)
        gates = torch.rand(shape[-1:] if self.constant else shape)
        if self.dtype.is_complex:
            gates = torch.polar(gates, 6.28 * torch.rand(gates.shape))
        return gates.to(self.device, self.dtype), tokens


def scan_by_loop(gates: Tensor, tokens: Tensor) -> Tensor:
    """The recurrence, a step of all channels at a time."""
    state, states = torch.zeros_like(tokens[:, 0]), []
    by_step = [gates] * tokens.shape[1] if gates.dim() == 1 else gates.unbind(1)
    for gate, token in zip(by_step, tokens.unbind(1), strict=True):
        state = torch.addcmul(token, gate, state)
        states.append(state)
    return torch.stack(states, 1)


def scan_by_association(gates: Tensor, tokens: Tensor) -> Tensor:
    """torch's own parallel scan."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: Any, right: Any) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    every = gates.expand(tokens.shape)
    _, states = associative_scan(combine, (every, tokens), dim=1, combine_mode="generic")
    found: Tensor = states
    return found

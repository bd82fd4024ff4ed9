"""The mixes of values to time, beside PyTorch expressions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.workloads.common import COMPILED, Makers, Workload, compiled
from resformer_kernels.bench.timing import OURS, Call
from resformer_kernels.mix import mix_value_embedding, mix_values
from resformer_kernels.testing.inputs import dtype_name

STACKED = "einsum of stacked values"


@dataclass(frozen=True)
class _MixingBenchmark(Workload):
    """Base of the mixing benchmarks."""

    count: int
    batch: int
    length: int
    heads: int
    head_dim: int
    dtype: torch.dtype
    direction: str
    group: str = "mix"
    flops: int = 0
    device: str = "cpu"
    compiles: bool = False
    """Whether torch.compile is among the peers on a CPU, where it takes seconds a shape."""

    op: ClassVar[Callable[..., Tensor]]
    peers: ClassVar[dict[str, Callable[..., Tensor]]]
    """PyTorch expressions; the first is also timed compiled."""

    @property
    def name(self) -> str:
        """Op, direction, count, shape and dtype."""
        shape = f"B{self.batch} H{self.heads} T{self.length} D{self.head_dim}"
        about = f"{self.direction} of {self.count} {shape} {dtype_name(self.dtype)}"
        return f"{type(self).op.__name__} {about}"

    def makers(self) -> Makers:
        """Ours, and the peers, each on inputs of its own."""
        makers: Makers = {
            OURS: lambda: self.ours(type(self).op, self.arguments()),
            **{name: partial(self._peer, mix) for name, mix in self.peers.items()},
        }
        if self.compiles or self.device != "cpu":
            plain = next(iter(self.peers.values()))
            makers[COMPILED] = lambda: self._peer(compiled(plain))
        return makers

    def _peer(self, mix: Callable[..., Tensor]) -> Call:
        return self.call(mix, self.arguments())

    def arguments(self) -> Sequence[Any]:
        """Arguments of each contestant; floating tensors among them have gradients."""
        raise NotImplementedError

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)


def _sum_of_products(values: list[Tensor], coefficients: list[Tensor]) -> Tensor:
    mixed = coefficients[0] * values[0]
    for coefficient, value in zip(coefficients[1:], values[1:], strict=True):
        mixed = mixed + coefficient * value
    return mixed


def _stack_and_einsum(values: list[Tensor], coefficients: list[Tensor]) -> Tensor:
    return _einsum(torch.stack(values), coefficients)


def _addcmul(values: list[Tensor], coefficients: list[Tensor]) -> Tensor:
    mixed = coefficients[0] * values[0]
    for coefficient, value in zip(coefficients[1:], values[1:], strict=True):
        mixed = torch.addcmul(mixed, value, coefficient.to(value.dtype))
    return mixed


def _einsum(stacked: Tensor, coefficients: list[Tensor]) -> Tensor:
    """`_stack_and_einsum` for users who keep their values in one tensor (n, B, T, H, D)."""
    return torch.einsum("n,n...->...", torch.stack(coefficients).to(stacked.dtype), stacked)


class MixBenchmark(_MixingBenchmark):
    """`mix_values` of `count` sources with learnable scalars."""

    op = mix_values
    peers: ClassVar = {
        "sum of products": _sum_of_products,
        "addcmul": _addcmul,
        "stack and einsum": _stack_and_einsum,
    }

    def makers(self) -> Makers:
        """Those of all mixes, and einsum over values that are one tensor already."""
        return {**super().makers(), STACKED: self._stacked}

    def _stacked(self) -> Call:
        values, coefficients = self.arguments()
        return self.call(_einsum, (torch.stack(values), coefficients))

    @property
    def bytes(self) -> int:
        """Each tensor once; backward reads grad and the sources, and writes their gradients."""
        tensors = self.count + 1 if self.direction == "forward" else 2 * self.count + 1
        elements = self.batch * self.length * self.heads * self.head_dim
        return tensors * elements * self.dtype.itemsize

    def arguments(self) -> Sequence[Any]:
        """Values and coefficients."""
        shape, share = (self.batch, self.length, self.heads, self.head_dim), 1.0 / self.count
        values = [self._normal(*shape) for _ in range(self.count)]
        return values, [torch.tensor(share, device=self.device) for _ in values]


def _by_indexing(v: Tensor, table: Tensor, token_ids: Tensor, gate: Tensor) -> Tensor:
    return v + gate * table[token_ids]


def _by_embedding(v: Tensor, table: Tensor, token_ids: Tensor, gate: Tensor) -> Tensor:
    return v + gate * F.embedding(token_ids, table.flatten(1)).view_as(v)


def _by_addcmul(v: Tensor, table: Tensor, token_ids: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(v, gate, F.embedding(token_ids, table.flatten(1)).view_as(v))


class EmbeddingBenchmark(_MixingBenchmark):
    """`mix_value_embedding` with a gate a token and head, from a table of `count` rows."""

    op = mix_value_embedding
    peers: ClassVar = {
        "indexing": _by_indexing,
        "F.embedding": _by_embedding,
        "F.embedding, addcmul": _by_addcmul,
    }

    @property
    def bytes(self) -> int:
        """v, one row a token, the result; backward: grad, rows, and a gradient of the table."""
        row = self.heads * self.head_dim * self.dtype.itemsize
        rows = 3 * self.batch * self.length
        return row * (rows if self.direction == "forward" else rows + self.count)

    def arguments(self) -> Sequence[Any]:
        """v, table, token_ids and gate."""
        rows, row = (self.batch, self.length), (self.heads, self.head_dim)
        v, table = self._normal(*rows, *row), self._normal(self.count, *row)
        token_ids = torch.randint(self.count, rows).to(self.device)
        gate = torch.rand(*rows, self.heads, 1, device=self.device).to(self.dtype)
        return v, table, token_ids, gate

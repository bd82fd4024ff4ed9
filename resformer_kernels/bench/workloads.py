"""Things to time, as data: inputs, bytes, FLOPs, and how ours and each peer would do them.

FLOPs: 2 · B · H · attended pairs · (Dk + Dv) forward, 2.5 times that backward. Mixing is not
counted, and is always inside the timed region, ours and the peer's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from resformer_kernels import explain
from resformer_kernels.bench.timing import OURS, Call, Unavailable
from resformer_kernels.mix import mix_value_embedding, mix_values

COMPILED = "torch.compile"
FLASH_ATTN = "flash-attn"


def require_kernel(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """`Unavailable` where no kernel serves `function(*args, **kwargs)`."""
    found = explain(function, *args, **kwargs)
    if found.backend in (None, "reference"):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in found.reasons.items())
        raise Unavailable(f"no kernel serves it ({reasons})")


def require_package(module: str) -> None:
    """`Unavailable` where there is no such package."""
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{module} is not installed")


def cuda_only(module: str) -> Call:
    """The maker of a peer that no CPU runs: always `Unavailable`."""
    require_package(module)
    raise Unavailable(f"{module} runs on CUDA tensors alone")


def attended_pairs(length: int, window: int | None) -> int:
    """Query-key pairs of a causal self-attention; `window` is the keys a query sees at most."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def timed_call(
    outputs: Callable[[], Tensor],
    leaves: Sequence[Tensor],
    direction: str,
    grad: Tensor | None = None,
) -> Call:
    """A call that runs `outputs` forward, or the gradient of every leaf through it.

    `grad` is the output's gradient (default: random).
    """
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return outputs()

        return forward
    for leaf in leaves:
        leaf.requires_grad_()
    result = outputs()
    given = torch.randn_like(result) if grad is None else grad
    return lambda: torch.autograd.grad(result, leaves, given, retain_graph=True)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` through torch.compile, anew for each shape; its gradient may be taken again."""
    # A backward that reuses its buffers cannot run twice on one graph, and a function that was
    # compiled often enough would run uncompiled from then on.
    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = 256
    made: Callable[..., Tensor] = torch.compile(function, dynamic=False)
    return made


@dataclass(frozen=True)
class _MixingBenchmark:
    """What the mixing benchmarks have in common."""

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
    op: ClassVar[str]
    mixes: ClassVar[dict[str, Callable[..., Tensor]]]
    """Each contestant's function, ours first; the second is also timed compiled, on a GPU."""

    @property
    def name(self) -> str:
        """Op, direction, count, shape and dtype."""
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"B{self.batch} H{self.heads} T{self.length} D{self.head_dim}"
        return f"{self.op} {self.direction} of {self.count} {shape} {dtype}"

    def makers(self) -> dict[str, Callable[[], Call]]:
        """Ours, and PyTorch expressions, each on inputs of its own; ours is `Unavailable` on a GPU
        that has no kernel."""
        makers: dict[str, Callable[[], Call]] = {
            name: partial(self._call, mix) for name, mix in self.mixes.items()
        }
        if self.device != "cpu":
            _, plain, *_ = self.mixes.values()
            makers[COMPILED] = lambda: self._call(compiled(plain))
        return makers

    def _call(self, mix: Callable[..., Tensor]) -> Call:
        arguments, leaves = self._arguments()
        if mix is self.mixes[OURS] and self.device != "cpu":
            require_kernel(mix, *arguments)
        return timed_call(lambda: mix(*arguments), leaves, self.direction)

    def _arguments(self) -> tuple[tuple[Any, ...], list[Tensor]]:
        """(what a contestant is called with, the tensors in it that have gradients)."""
        raise NotImplementedError


def _sum_of_products(values: list[Tensor], coefficients: list[Tensor]) -> Tensor:
    mixed = coefficients[0] * values[0]
    for coefficient, value in zip(coefficients[1:], values[1:], strict=True):
        mixed = mixed + coefficient * value
    return mixed


def _stack_and_einsum(values: list[Tensor], coefficients: list[Tensor]) -> Tensor:
    stacked = torch.stack(values)
    return torch.einsum("n,n...->...", torch.stack(coefficients).to(stacked.dtype), stacked)


class MixBenchmark(_MixingBenchmark):
    """`mix_values` of `count` sources with learnable scalars, against PyTorch expressions."""

    op = "mix_values"
    mixes: ClassVar[dict[str, Callable[..., Tensor]]] = {
        OURS: mix_values,
        "sum of products": _sum_of_products,
        "stack and einsum": _stack_and_einsum,
    }

    @property
    def bytes(self) -> int:
        """Each tensor once; backward reads grad and the sources, and writes their gradients."""
        tensors = self.count + 1 if self.direction == "forward" else 2 * self.count + 1
        elements = self.batch * self.length * self.heads * self.head_dim
        return tensors * elements * self.dtype.itemsize

    def _arguments(self) -> tuple[tuple[Any, ...], list[Tensor]]:
        shape, device = (self.batch, self.length, self.heads, self.head_dim), self.device
        values = [torch.randn(shape, device=device).to(self.dtype) for _ in range(self.count)]
        share = 1.0 / self.count
        coefficients = [torch.tensor(share, device=device) for _ in range(self.count)]
        return (values, coefficients), [*values, *coefficients]


def _by_indexing(v: Tensor, table: Tensor, token_ids: Tensor, gate: Tensor) -> Tensor:
    return v + gate * table[token_ids]


def _by_embedding(v: Tensor, table: Tensor, token_ids: Tensor, gate: Tensor) -> Tensor:
    return v + gate * F.embedding(token_ids, table.flatten(1)).view_as(v)


class EmbeddingBenchmark(_MixingBenchmark):
    """`mix_value_embedding` with a gate a token and head, against PyTorch expressions.

    The table has `count` rows.
    """

    op = "mix_value_embedding"
    mixes: ClassVar[dict[str, Callable[..., Tensor]]] = {
        OURS: mix_value_embedding,
        "indexing": _by_indexing,
        "F.embedding": _by_embedding,
    }

    @property
    def bytes(self) -> int:
        """v, one row a token, the result; backward: grad, rows, and a gradient of the table."""
        row = self.heads * self.head_dim * self.dtype.itemsize
        tokens = self.batch * self.length
        if self.direction == "forward":
            return 3 * tokens * row
        return 3 * tokens * row + self.count * row

    def _arguments(self) -> tuple[tuple[Any, ...], list[Tensor]]:
        rows, row = (self.batch, self.length), (self.heads, self.head_dim)
        v = torch.randn(*rows, *row, device=self.device).to(self.dtype)
        table = torch.randn(self.count, *row, device=self.device).to(self.dtype)
        token_ids = torch.randint(self.count, rows).to(self.device)
        gate = torch.rand(*rows, self.heads, 1, device=self.device).to(self.dtype)
        return (v, table, token_ids, gate), [v, table, gate]

"""Attention with exclusive outputs and a gate, beside the same with a pass for each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.workloads.common import COMPILED, compiled
from resformer_kernels.attention.api import value_residual_attention
from resformer_kernels.bench.attention import (
    HEADS_FIRST,
    TIME_FIRST,
    AttentionBenchmark,
)
from resformer_kernels.bench.timing import PLAIN, Call, timed_call

PASSES = "ours, separate passes"
EPS = 1e-6


def passes(y: Tensor, value: Tensor, exclusive: Tensor, gate: Tensor, heads: int) -> Tensor:
    """gate * (y - exclusive * projection onto value): y has its heads on axis `heads`, and value
    those of the KV heads, which it is not expanded to the queries'."""
    unit = F.normalize(value, dim=-1, eps=EPS).unsqueeze(heads + 1)
    kv_heads = value.shape[heads]
    grouped, share = (x.unflatten(heads, (kv_heads, -1)) for x in (y, exclusive))
    taken = share * (grouped * unit).sum(-1, keepdim=True) * unit
    return gate * (grouped - taken).flatten(heads, heads + 1)


def sdpa_and_passes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    v_first: Tensor,
    lambda_v: Tensor,
    lambda_first: Tensor,
    exclusive: Tensor,
    gate: Tensor,
    *,
    heads_first: bool,
) -> Tensor:
    """The mix, causal SDPA and the passes, in PyTorch operations: out (B, H, T, D)."""
    mixed = lambda_v * v + lambda_first * v_first
    if not heads_first:
        q, k, mixed, exclusive, gate = (x.transpose(1, 2) for x in (q, k, mixed, exclusive, gate))
    grouped = q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, mixed, is_causal=True, enable_gqa=grouped)
    return passes(y, mixed, exclusive, gate, 1)


def ours_and_passes(*tensors: Tensor, causal: bool, window: tuple[int, int]) -> Tensor:
    """Our attention, which returns V', and the passes: out (B, T, H, D)."""
    *operands, exclusive, gate = tensors
    y, mixed = value_residual_attention(
        *operands, causal=causal, window=window, return_mixed_value=True
    )
    return passes(y, mixed, exclusive, gate, 2)


@dataclass(frozen=True)
class EpilogueBenchmark(AttentionBenchmark):
    """An attention case with `exclusive` and `out_gate` (B, T, H, 1), and gradients to all."""

    peers: tuple[str, ...] = (PLAIN, PASSES, HEADS_FIRST, TIME_FIRST, COMPILED)

    known_peers: ClassVar[Mapping[str, Callable[[Any], Call]]] = {
        PLAIN: lambda case: case.called(value_residual_attention, 6),
        PASSES: lambda case: case.called(ours_and_passes, 8),
        HEADS_FIRST: lambda case: case.sdpa(sdpa_and_passes, heads_first=True),
        TIME_FIRST: lambda case: case.sdpa(sdpa_and_passes, heads_first=False),
        COMPILED: lambda case: case.sdpa(compiled(sdpa_and_passes), heads_first=False),
    }

    @property
    def name(self) -> str:
        """That of the plain case, under another first word."""
        return super().name.replace("attention", "exclusive", 1)

    @property
    def group(self) -> str:
        """ "exclusive" and the direction."""
        return f"exclusive {self.direction}"

    def leaves(self, *, heads_first: bool = False) -> list[Tensor]:
        """Those of attention, then exclusive and out_gate."""
        random = torch.Generator(self.device).manual_seed(2)
        shape = (self.batch, self.length, self.heads, 1)
        factors = [
            torch.rand(shape, device=self.device, generator=random).to(self.dtype) for _ in range(2)
        ]
        if heads_first:
            factors = [x.transpose(1, 2).contiguous() for x in factors]
        return [*super().leaves(heads_first=heads_first), *factors]

    def ours(self) -> Call:
        """This package's one call."""

        def attend(*tensors: Tensor, **options: Any) -> Any:
            *operands, exclusive, gate = tensors
            return value_residual_attention(
                *operands, exclusive=exclusive, out_gate=gate, exclusive_eps=EPS, **options
            )

        return self.called(attend, 8)

    def called(self, function: Callable[..., Any], count: int) -> Call:
        """`function` on the first `count` leaves, with the mask."""
        leaves = self.leaves()[:count]
        attend = partial(function, *leaves, **self.options())
        return timed_call(attend, leaves, self.direction, self.grad())

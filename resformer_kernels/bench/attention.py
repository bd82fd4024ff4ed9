"""Causal self-attention on a CPU to time, beside every way to do it that is installed.

Mixing is always inside the timed region, ours and the peer's; FLOPs are those of `workloads`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.workloads.device import FA3, FLEX, DeviceAttention
from resformer_kernels.attention.api import value_residual_attention
from resformer_kernels.bench.timing import OURS, Call, Unavailable
from resformer_kernels.bench.workloads import (
    COMPILED,
    FLASH_ATTN,
    attended_pairs,
    compiled,
    cuda_only,
    require_package,
    timed_call,
)

HEADS_FIRST = "SDPA (B,H,T,D)"
TIME_FIRST = "SDPA (B,T,H,D)"
MATH = "SDPA math"
X_TRANSFORMERS = "x-transformers"
NO_WINDOW = "ours, no window"

SDPA = (HEADS_FIRST, TIME_FIRST)
"""What torch picks by itself, in either layout: the fastest without a compiler."""
QUICK = (*SDPA, X_TRANSFORMERS, FLASH_ATTN, FA3)
PEERS = (*QUICK, MATH, COMPILED, FLEX)
"""Of what is not quick, one writes every score, and two compile for seconds a shape."""

_BACKWARD_FLOPS = 2.5
_MOST_SCORES = 512 * 2**20
"""Bytes of float32 scores beyond which SDPA's plain mathematics are left out."""


@dataclass(frozen=True)
class AttentionBenchmark:
    """Causal self-attention over V' = λ_v V + λ_first V₁, both λ learnable scalars.

    Peers mix, then attend. With a window the peer is this package's own full causal attention.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    dtype: torch.dtype
    direction: str
    """"forward" or "backward"."""
    window: int | None = None
    """Keys that a query sees at most; None: all before it."""
    peers: tuple[str, ...] = SDPA
    """Of `PEERS`."""

    @property
    def name(self) -> str:
        """Shape, dtype and direction."""
        heads = (
            f"H{self.heads}"
            if self.heads == self.kv_heads
            else (f"Hq{self.heads} Hkv{self.kv_heads}")
        )
        window = "" if self.window is None else f" window {self.window}"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"B{self.batch} {heads} T{self.length} D{self.head_dim}"
        return f"attention {self.direction} {shape} causal{window} {dtype}"

    @property
    def group(self) -> str:
        """ "attention" and the direction; windows stand apart."""
        kind = "attention" if self.window is None else "window"
        return f"{kind} {self.direction}"

    @property
    def flops(self) -> int:
        """Of the attended pairs alone."""
        pairs = attended_pairs(self.length, self.window)
        forward = 4 * self.batch * self.heads * pairs * self.head_dim
        return forward if self.direction == "forward" else int(_BACKWARD_FLOPS * forward)

    @property
    def bytes(self) -> int:
        """Each tensor once: q, out, k, v, v_first; backward also grad_out and the gradients."""
        per_head = self.batch * self.length * self.head_dim * self.dtype.itemsize
        forward = per_head * (2 * self.heads + 3 * self.kv_heads)
        if self.direction == "forward":
            return forward
        return forward + per_head * (2 * self.heads + 3 * self.kv_heads)

    @property
    def share_of_full(self) -> float:
        """Attended pairs, as a share of those without the window."""
        return attended_pairs(self.length, self.window) / attended_pairs(self.length, None)

    @property
    def window_share(self) -> float | None:
        """`share_of_full` of a case with a window."""
        return None if self.window is None else self.share_of_full

    def makers(self) -> dict[str, Callable[[], Call]]:
        """Ours, and each of `peers`, on tensors of its own layout."""
        if self.window is not None:
            window = self.window
            return {OURS: lambda: self._ours(window), NO_WINDOW: lambda: self._ours(None)}
        peers: dict[str, Callable[[], Call]] = {
            HEADS_FIRST: lambda: self._sdpa(self._attend, heads_first=True),
            TIME_FIRST: lambda: self._sdpa(self._attend, heads_first=False),
            MATH: self._math,
            X_TRANSFORMERS: self._x_transformers,
            FLASH_ATTN: functools.partial(cuda_only, "flash_attn"),
            FA3: functools.partial(cuda_only, "flash_attn_interface"),
            COMPILED: lambda: self._sdpa(compiled(self._attend), heads_first=False),
            FLEX: self._flex,
        }
        chosen = {name: peers[name] for name in self.peers}
        return {OURS: lambda: self._ours(None), **chosen}

    def _leaves(self, *, heads_first: bool) -> list[Tensor]:
        """q, k, v, v_first, lambda_v, lambda_first."""
        leaves = []
        for heads in (self.heads, self.kv_heads, self.kv_heads, self.kv_heads):
            shape = (self.batch, self.length, heads, self.head_dim)
            if heads_first:
                shape = (self.batch, heads, self.length, self.head_dim)
            leaves.append(torch.randn(shape).to(self.dtype))
        return [*leaves, torch.tensor(0.5), torch.tensor(0.5)]

    def _ours(self, window: int | None) -> Call:
        leaves = self._leaves(heads_first=False)
        sides = (-1, -1) if window is None else (window - 1, 0)
        return timed_call(
            lambda: value_residual_attention(*leaves, causal=True, window=sides),
            leaves,
            self.direction,
        )

    def _sdpa(self, attend: Callable[..., Tensor], *, heads_first: bool) -> Call:
        leaves = self._leaves(heads_first=heads_first)
        return timed_call(lambda: attend(*leaves, heads_first), leaves, self.direction)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        v_first: Tensor,
        lambda_v: Tensor,
        lambda_first: Tensor,
        heads_first: bool,
    ) -> Tensor:
        mixed = lambda_v * v + lambda_first * v_first
        if not heads_first:
            q, k, mixed = (x.transpose(1, 2) for x in (q, k, mixed))
        grouped = self.heads != self.kv_heads
        return F.scaled_dot_product_attention(q, k, mixed, is_causal=True, enable_gqa=grouped)

    def _math(self) -> Call:
        scores = 4 * self.batch * self.heads * self.length**2
        if scores > _MOST_SCORES:
            raise Unavailable(f"would hold {scores / 2**30:.1f} GiB of scores, some times over")

        def attend(*arguments: object) -> Tensor:
            with sdpa_kernel([SDPBackend.MATH]):
                return self._attend(*arguments)  # type: ignore[arg-type]

        return self._sdpa(attend, heads_first=True)

    def _flex(self) -> Call:
        if self.direction == "backward":
            raise Unavailable("torch has no backward of it on a CPU")
        shape = (self.batch, self.heads, self.kv_heads, self.length, self.head_dim)
        case = DeviceAttention(*shape, self.dtype, self.direction, True, "cpu", flex=True)
        return case.makers()[FLEX]()

    def _x_transformers(self) -> Call:
        """Its `Attention` without projections: V' = lerp(V₁, V, 0.5), then its choice of SDPA.

        Its gates are linear layers of the input, and would be timed too: the fixed mix is not.
        """
        require_package("x_transformers")
        if self.heads != self.kv_heads:
            raise Unavailable("takes q, k and v of one width where projections are left out")
        module = importlib.import_module("x_transformers.x_transformers")
        attention = module.Attention(
            self.heads * self.head_dim,
            heads=self.heads,
            dim_head=self.head_dim,
            causal=True,
            flash=True,
            qkv_receive_diff_residuals=True,
        )
        for projection in ("to_q", "to_k", "to_v", "to_out"):
            setattr(attention, projection, torch.nn.Identity())
        shape = (self.batch, self.length, self.heads * self.head_dim)
        qkv = torch.randn(3, *shape).to(self.dtype)
        v_first = torch.randn(self.batch, self.heads, self.length, self.head_dim).to(self.dtype)
        return timed_call(
            lambda: attention(qkv, value_residual=v_first), [qkv, v_first], self.direction
        )

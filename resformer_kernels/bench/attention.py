"""Self-attention over mixed values as a case to time, beside torch's SDPA.

FLOPs: 2 · B · H · attended pairs · (Dk + Dv) forward, 2.5 times that backward. Mixing is not
counted, and is always inside the timed region, ours and the peer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from resformer_kernels.attention.api import value_residual_attention
from resformer_kernels.bench.timing import OURS, Call, timed_call
from resformer_kernels.testing.inputs import dtype_name

HEADS_FIRST = "SDPA (B,H,T,D)"
TIME_FIRST = "SDPA (B,T,H,D)"
NO_WINDOW = "ours, no window"

SDPA = (HEADS_FIRST, TIME_FIRST)
"""What torch picks by itself, in either layout: the fastest without a compiler."""

_BACKWARD_FLOPS = 2.5


def attended_pairs(length: int, window: int | None) -> int:
    """Query-key pairs of a causal self-attention; `window` is the keys a query sees at most."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def mix_and_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    v_first: Tensor,
    lambda_v: Tensor,
    lambda_first: Tensor,
    *,
    heads_first: bool = False,
) -> Tensor:
    """The mix in PyTorch operations, then causal SDPA: out (B, H, T, D)."""
    mixed = lambda_v * v + lambda_first * v_first
    if not heads_first:
        q, k, mixed = (x.transpose(1, 2) for x in (q, k, mixed))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, mixed, is_causal=True, enable_gqa=grouped)


@dataclass(frozen=True)
class AttentionBenchmark:
    """Self-attention over V' = λ_v V + λ_first V₁, both λ learnable scalars.

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
    """The most keys that a query sees; None: all before it."""
    peers: tuple[str, ...] = SDPA
    """Names in `known_peers`."""
    causal: bool = True
    device: str = "cpu"

    known_peers: ClassVar[Mapping[str, Callable[[Any], Call]]] = {
        HEADS_FIRST: lambda case: case.sdpa(mix_and_sdpa, heads_first=True),
        TIME_FIRST: lambda case: case.sdpa(mix_and_sdpa, heads_first=False),
    }
    """The maker of every peer, by name."""

    @property
    def name(self) -> str:
        """Shape, mask, dtype and direction."""
        grouped = self.heads != self.kv_heads
        heads = f"Hq{self.heads} Hkv{self.kv_heads}" if grouped else f"H{self.heads}"
        window = "" if self.window is None else f" window {self.window}"
        mask = ("causal" if self.causal else "full") + window
        shape = f"B{self.batch} {heads} T{self.length} D{self.head_dim}"
        return f"attention {self.direction} {shape} {mask} {dtype_name(self.dtype)}"

    @property
    def group(self) -> str:
        """ "attention" or "window", and the direction."""
        kind = "attention" if self.window is None else "window"
        return f"{kind} {self.direction}"

    @property
    def flops(self) -> int:
        """Operations on the attended pairs alone."""
        pairs = attended_pairs(self.length, self.window) if self.causal else self.length**2
        forward = 4 * self.batch * self.heads * pairs * self.head_dim
        return forward if self.direction == "forward" else int(_BACKWARD_FLOPS * forward)

    @property
    def bytes(self) -> int:
        """Each tensor once: q, out, k, v, v_first; backward also grad_out and the gradients."""
        per_head = self.batch * self.length * self.head_dim * self.dtype.itemsize
        forward = per_head * (2 * self.heads + 3 * self.kv_heads)
        return forward if self.direction == "forward" else 2 * forward

    @property
    def window_share(self) -> float | None:
        """Attended pairs of a case with a window, as a share of those without it."""
        if self.window is None:
            return None
        return attended_pairs(self.length, self.window) / attended_pairs(self.length, None)

    def makers(self) -> dict[str, Callable[[], Call]]:
        """The maker of ours, and of each of `peers`; all draw the same numbers."""
        if self.window is not None:
            return {OURS: self.ours, NO_WINDOW: replace(self, window=None).ours}
        return {
            OURS: self.ours,
            **{name: partial(self.known_peers[name], self) for name in self.peers},
        }

    def leaves(self, *, heads_first: bool = False) -> list[Tensor]:
        """q, k, v, v_first, lambda_v, lambda_first; the same numbers at every call."""
        generator = torch.Generator(self.device).manual_seed(0)
        tensors = [self._normal(h, generator) for h in (self.heads, *(self.kv_heads,) * 3)]
        if heads_first:
            tensors = [x.transpose(1, 2).contiguous() for x in tensors]
        return [*tensors, *(torch.tensor(0.5, device=self.device) for _ in range(2))]

    def grad(self) -> Tensor:
        """A gradient of out, time first; the same numbers at every call."""
        return self._normal(self.heads, torch.Generator(self.device).manual_seed(1))

    def _normal(self, heads: int, generator: torch.Generator) -> Tensor:
        shape = (self.batch, self.length, heads, self.head_dim)
        return torch.randn(shape, device=self.device, generator=generator).to(self.dtype)

    def options(self) -> dict[str, Any]:
        """The mask, as `value_residual_attention` takes it."""
        window = (-1, -1) if self.window is None else (self.window - 1, 0)
        return {"causal": self.causal, "window": window}

    def ours(self) -> Call:
        """This package's call: out (B, T, H, D), or the gradients of `leaves`."""
        leaves = self.leaves()
        attend = partial(value_residual_attention, *leaves, **self.options())
        return timed_call(attend, leaves, self.direction, self.grad())

    def sdpa(self, attend: Callable[..., Tensor], *, heads_first: bool) -> Call:
        """A peer's call: `attend(q, k, v, v_first, lambda_v, lambda_first, heads_first=)`."""
        leaves = self.leaves(heads_first=heads_first)
        return timed_call(partial(attend, *leaves, heads_first=heads_first), leaves, self.direction)

"""Rotary position embedding (Su et al., arXiv 2104.09864) in Llama's half-split layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Cosines and sines of every position below `max_seqlen`.

    Args:
        head_dim: size of a query or key head; even.
        max_seqlen: number of positions.
        base: wavelengths run from 2π to 2π · base positions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seqlen: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even and at least 2, got {head_dim}")
        if max_seqlen < 1:
            raise ValueError(f"max_seqlen must be at least 1, got {max_seqlen}")
        self.max_seqlen = max_seqlen
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        angles = torch.outer(torch.arange(max_seqlen, dtype=torch.float32), base**-exponents)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """cos and sin of positions start to start + length, each (length, head_dim / 2).

        Raises ValueError beyond `max_seqlen`.
        """
        if start < 0 or start + length > self.max_seqlen:
            raise ValueError(
                f"positions {start} to {start + length} are not within max_seqlen {self.max_seqlen}"
            )
        return self.cos[start : start + length], self.sin[start : start + length]

    def after(self, lengths: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the `length` positions after each of `lengths`: (B, length, head_dim / 2),
        or as `forward` returns them where lengths are equal.

        Raises ValueError beyond `max_seqlen`.
        """
        cos, sin = self(length, max(lengths, default=0))
        if len(set(lengths)) < 2:
            return cos, sin
        starts = torch.tensor(lengths, device=self.cos.device)
        places = starts[:, None] + torch.arange(length, device=self.cos.device)
        return self.cos[places], self.sin[places]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, H, D) by the angles of cos and sin, (T, D / 2) or (B, T, D / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

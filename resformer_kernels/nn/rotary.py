"""Rotary position embedding (Su et al., arXiv 2104.09864) in Llama's half-split layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core import across
from resformer_kernels._core.checks import integer, real
from resformer_kernels.nn.state import AdaptsCheckpoint


class RotaryEmbedding(AdaptsCheckpoint):
    """Cosines and sines of every position below `max_seqlen`.

    Checkpoints do not hold these tables: the module makes them anew where it is moved or loaded.

    Args:
        head_dim: size of a query or key head; even.
        max_seqlen: number of positions.
        base: wavelengths run from 2π to 2π · base positions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seqlen: int, *, base: float = 10_000.0) -> None:
        super().__init__()
        self.head_dim = integer("head_dim", head_dim)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and at least 2, got {head_dim}")
        self.max_seqlen = integer("max_seqlen", max_seqlen, 1)
        self.base = real("base", base)
        empty = torch.empty((self.max_seqlen, self.head_dim // 2), dtype=torch.float32)
        self.register_buffer("cos", empty, persistent=False)
        self.register_buffer("sin", empty.clone(), persistent=False)
        self._fill()

    @torch.no_grad()
    def _fill(self) -> None:
        options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        exponents = torch.arange(0, self.head_dim, 2, **options) / self.head_dim
        positions = torch.arange(self.max_seqlen, **options)
        angles = torch.outer(positions, self.base**-exponents)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        before = self.cos
        super()._apply(fn, recurse)
        # `to_empty` and a move from the meta device leave tables without values.
        if self.cos is not before:
            self._fill()
        return self

    def adapt_checkpoint(self, state: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Leave the meta device with the weights that are loaded beside this module."""
        del state, prefix, errors
        if self.cos.is_meta:
            self.on(torch.get_default_device())

    def on(self, device: torch.device) -> RotaryEmbedding:
        """This module, its tables on `device`."""
        if self.cos.device != device:
            # Outside inference mode, whose tensors training refuses.
            with torch.inference_mode(False):
                self.to_empty(device=device)
        return self

    def forward(self, length: int, start: int = 0) -> tuple[Tensor, Tensor]:
        """cos and sin of positions start to start + length, each (length, head_dim / 2).

        Under `context_parallel` those of the `length` positions that this rank holds; start is 0.

        Raises ValueError beyond `max_seqlen`.
        """
        length, start = integer("length", length, 0), integer("start", start)
        split = across.current()
        if split is not None and start == 0:
            parts = [self._rows(first, stop) for first, stop in split.ranges(length)]
            return torch.cat([cos for cos, _ in parts]), torch.cat([sin for _, sin in parts])
        return self._rows(start, start + length)

    def _rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if start < 0 or stop > self.max_seqlen:
            raise ValueError(
                f"positions {start} to {stop} are not within max_seqlen {self.max_seqlen}"
            )
        return self.cos[start:stop], self.sin[start:stop]

    def after(self, lengths: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the `length` positions after each of `lengths`: (B, length, head_dim / 2),
        or as `forward` returns them where lengths are equal.

        Raises ValueError beyond `max_seqlen`.
        """
        given, length = [integer("lengths", n) for n in lengths], integer("length", length, 0)
        cos, sin = self(length, max(given, default=0))
        if len(set(given)) < 2:
            return cos, sin
        starts = torch.tensor(given, device=self.cos.device)
        places = starts[:, None] + torch.arange(length, device=self.cos.device)
        return self.cos[places], self.sin[places]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, H, D) by the angles of cos and sin, (T, D / 2) or (B, T, D / 2)."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

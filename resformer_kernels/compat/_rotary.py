"""Rotary embedding of queries and new keys, as FlashAttention's cached attention applies it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_device, check_flag, check_tensor
from resformer_kernels.kvcache.packed import Packing


class Rotary(NamedTuple):
    """The rotary arguments, as they were given."""

    cos: Any
    sin: Any
    interleaved: Any
    """Whether channels 2i and 2i + 1 are a pair; else i and i + rotary_dim / 2."""
    seqlens: Any = None
    """(B,) int32, the position of each sequence's first new token; None: cache_seqlens."""

    @property
    def given(self) -> bool:
        """Whether anything is rotated."""
        return self.cos is not None or self.sin is not None


def check_rotary(rotary: Rotary, q: Tensor, k: Any, capacity: int) -> None:
    """Check the tables against q, and that there are new keys."""
    check_flag("rotary_interleaved", rotary.interleaved)
    if not rotary.given:
        return
    if k is None:
        raise ValueError("rotary_cos and rotary_sin must be None without k, which they rotate")
    for name, table in (("rotary_cos", rotary.cos), ("rotary_sin", rotary.sin)):
        check_tensor(name, table, 2, "(positions, rotary_dim / 2)")
        if table.dtype not in (q.dtype, torch.float32):
            raise TypeError(f"{name} must be float32 or q's dtype {q.dtype}, got {table.dtype}")
        check_device(name, table, q.device)
        if table.shape != rotary.cos.shape:
            raise ValueError(
                f"{name} must have rotary_cos's shape {tuple(rotary.cos.shape)}, "
                f"got {tuple(table.shape)}"
            )
        if table.shape[0] < capacity or 2 * table.shape[1] > q.shape[-1]:
            raise ValueError(
                f"{name} must be (positions, rotary_dim / 2), at least the cache's {capacity} "
                f"positions and a rotary_dim of at most {q.shape[-1]}, got {tuple(table.shape)}"
            )


def rotated(
    rotary: Rotary, x: Tensor, first: Tensor, packed: Packing | None, stepping: bool
) -> Tensor:
    """x, q or k, rotated.

    Args:
        rotary: the tables.
        x: (B, T, H, D), or (total, H, D) as `packed` says.
        first: (B,), the position of each sequence's first token.
        packed: how the tokens are packed; None for a batch.
        stepping: each token stands one position after the one before; else all share the first's.
    """
    if packed is None:
        start, step = first[:, None], torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    else:
        start, step = first[packed.sequence], packed.place
    # The op refuses a length that lies outside the cache; that check comes after this.
    places = (start.long() + step * stepping).clamp(0, rotary.cos.shape[0] - 1)
    return _rotate(x, rotary.cos[places], rotary.sin[places], rotary.interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x (..., H, D), its first channels rotated by cos and sin (..., rotary_dim / 2)."""
    half = cos.shape[-1]
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    turned, rest = x[..., : 2 * half].to(wide), x[..., 2 * half :]
    pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
    axis = -1 if interleaved else -2
    first, second = pairs.unbind(axis)
    cos, sin = cos.unsqueeze(-2).to(wide), sin.unsqueeze(-2).to(wide)
    both = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=axis)
    return torch.cat((both.flatten(-2).to(x.dtype), rest), dim=-1)

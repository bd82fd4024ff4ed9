"""What the documentation of FlashAttention says, one score at a time, and inputs for it."""

from __future__ import annotations

import torch
from torch import Tensor

ADDED = [
    *("v_first", "lambda_v", "lambda_first", "exclusive", "exclusive_eps", "out_gate", "backend")
]
"""Keywords that every drop-in has beside its original's arguments."""


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def documented(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) and LSE (H, T) of one sequence, one score at a time."""
    tq, heads, dim = q.shape
    tk, kv_heads = k.shape[:2]
    left, right = window_size
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    out, lse = q.new_zeros(tq, heads, v.shape[-1]), q.new_full((heads, tq), -torch.inf)
    for h in range(heads):
        kv_head = h // (heads // kv_heads)
        for i in range(tq):
            at = i + tk - tq
            seen = [
                j
                for j in range(tk)
                if (not causal or j <= at)
                and (left < 0 or j >= at - left)
                and (right < 0 or j <= at + right)
            ]
            if not seen:
                continue
            s = scale * (k[seen, kv_head] @ q[i, h])
            if softcap > 0:
                s = softcap * torch.tanh(s / softcap)
            lse[h, i] = s.logsumexp(0)
            out[i, h] = s.softmax(0) @ v[seen, kv_head]
    return out, lse


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)

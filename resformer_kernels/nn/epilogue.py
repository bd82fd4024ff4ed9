"""What a layer makes of its attention's output: exclusive self-attention and the output gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resformer_kernels._core.checks import describe, integer, real
from resformer_kernels.nn.local import local_parameter

LEARNED = "learned"
GATES = ("head", "channel")


class Epilogue(nn.Module):
    """The arguments `exclusive` and `out_gate` of `value_residual_attention`, from a layer's input.

    Args:
        dim: channels of the layer's input.
        num_heads: query heads.
        head_dim: channels per head.
        exclusive: how much of the part along the token's own value is taken out of the output: None
            for nothing, a number (1.0 is exclusive self-attention, arXiv 2603.09078), or "learned"
            for tanh(alpha) with an alpha per head, initially 0.
        gate: None, "head" for sigmoid(W x) with one number per token and head, or "channel" with
            one per token, head and channel.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        exclusive: float | str | None,
        gate: str | None,
    ) -> None:
        super().__init__()
        dim, num_heads = integer("dim", dim, 1), integer("num_heads", num_heads, 1)
        self.exclusive, self.gate = checked_exclusive(exclusive), checked_gate(gate)
        if self.exclusive == LEARNED:
            self.alpha = nn.Parameter(torch.empty(num_heads, 1))
            self.reset_parameters()
        if self.gate is not None:
            columns = num_heads * (1 if self.gate == "head" else integer("head_dim", head_dim, 1))
            self.gate_proj = nn.Linear(dim, columns, bias=False)
            self.columns = columns // num_heads

    def reset_parameters(self) -> None:
        """alpha = 0: nothing is taken out."""
        if self.exclusive == LEARNED:
            nn.init.zeros_(self.alpha)

    def extra_repr(self) -> str:
        """What it does."""
        return f"exclusive={self.exclusive!r}, gate={self.gate!r}"

    def forward(self, x: Tensor, q: Tensor) -> dict[str, Any]:
        """The arguments for x (B, T, dim) and its queries q, (B, T, heads, head_dim); none where
        the layer's output is that of the softmax."""
        found: dict[str, Any] = {}
        if self.exclusive == LEARNED:
            found["exclusive"] = torch.tanh(local_parameter(self.alpha, q))
        elif self.exclusive is not None:
            found["exclusive"] = self.exclusive
        if self.gate is not None:
            gate = torch.sigmoid(self.gate_proj(x))
            found["out_gate"] = gate.unflatten(-1, (-1, self.columns))
        return found


def checked_exclusive(exclusive: Any) -> float | str | None:
    """`exclusive` as None, a float or "learned"."""
    if exclusive is None or exclusive == LEARNED:
        return exclusive
    if isinstance(exclusive, str):
        raise ValueError(f"exclusive must be a number, {LEARNED!r} or None, got {exclusive!r}")
    return float(real("exclusive", exclusive))


def checked_gate(gate: Any) -> str | None:
    """`gate` as None or one of `GATES`."""
    if gate is not None and gate not in GATES:
        raise ValueError(f"gate must be 'head', 'channel' or None, got {describe(gate)}")
    return gate

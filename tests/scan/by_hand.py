"""The scan and its gradients once more, on Python's own numbers: no code of the package runs.

Quick for a few channels and a million steps, where a loop over tensors is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Scanned(NamedTuple):
    """Everything, in float64 or complex128; gates' gradients a step each."""

    states: Tensor
    final: Tensor
    d_gates: Tensor
    d_tokens: Tensor
    d_initial: Tensor


def _column(
    g: list[Any], x: list[Any], start: Any, d_states: list[Any], d_final: Any
) -> tuple[list[Any], ...]:
    h, states = start, []
    for gate, token in zip(g, x, strict=True):
        h = gate * h + token
        states.append(h)
    before = [start, *states[:-1]]
    a, d_tokens, d_gates = d_final, [], []
    for t in range(len(x) - 1, -1, -1):
        a = a + d_states[t]
        d_tokens.append(a)
        d_gates.append(a * before[t].conjugate())
        a = a * g[t].conjugate()
    return states, [h], d_gates[::-1], d_tokens[::-1], [a]


def scan_by_hand(
    gates: Tensor, tokens: Tensor, initial: Tensor, d_states: Tensor, d_final: Tensor
) -> Scanned:
    """One sequence, forwards: gates, tokens and d_states (T, N), initial and d_final (N,)."""
    wide = torch.complex128 if tokens.is_complex() else torch.float64
    rows = [x.to(wide).t().tolist() for x in (gates, tokens, d_states)]
    ends = [x.to(wide).tolist() for x in (initial, d_final)]
    found = [
        _column(rows[0][n], rows[1][n], ends[0][n], rows[2][n], ends[1][n])
        for n in range(tokens.shape[1])
    ]
    states, final, d_gates, d_tokens, d_initial = (
        torch.tensor(parts, dtype=wide) for parts in zip(*found, strict=True)
    )
    return Scanned(states.t(), final[:, 0], d_gates.t(), d_tokens.t(), d_initial[:, 0])

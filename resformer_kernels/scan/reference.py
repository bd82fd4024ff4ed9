"""The scan in plain PyTorch, step by step: slow, obvious, and the definition of correct.

    h_t = g_t * h_{t-1} + x_t

It computes in float64 or complex128 for inputs of these, in complex64 for complex64 and in float32
for all others, and rounds each state once. It is differentiable by autograd as it stands.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from resformer_kernels._core.gradient import seeing
from resformer_kernels._core.hardware import Hardware
from resformer_kernels.scan.record import ScanCall, state_dtype

NAME = "reference"

_LARGE = 2**12


def unsupported_reason(_call: ScanCall, _hardware: Hardware) -> str | None:
    """None: the reference serves everything."""
    return None


def is_large(call: ScanCall) -> bool:
    """Whether the Python loop has enough steps to be worth a warning."""
    return call.tokens.shape[-2] >= _LARGE


def run(call: ScanCall) -> tuple[Tensor, Tensor]:
    """(states, final state), contiguous."""
    kind = call.tokens.device.type
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
        wide = state_dtype(call.tokens.dtype)
        tokens, gates = call.tokens.to(wide), call.gates.to(wide)
        if call.initial_state is None:
            initial = tokens.new_zeros((call.sequences, tokens.shape[-1]))
        else:
            initial = call.initial_state.to(wide)
        scan = _fixed if call.cu_seqlens is None else _packed
        states, final = scan(call, gates, tokens, initial)
        if not call.sequences or not tokens.numel():
            leaves = (tokens, gates, initial)
            states, final = seeing(states, leaves), seeing(final, leaves)
        return states.to(call.tokens.dtype).contiguous(), final.clone()


def _order(length: int, reverse: bool) -> range:
    return range(length - 1, -1, -1) if reverse else range(length)


def _fixed(call: ScanCall, gates: Tensor, tokens: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    x = tokens.unbind(1)
    g = [gates] * len(x) if gates.dim() == 1 else gates.unbind(1)
    h, states = initial, list(x)
    for t in _order(len(x), call.reverse):
        h = g[t] * h + x[t]
        states[t] = h
    return torch.stack(states, 1) if states else tokens.clone(), h


def _packed(
    call: ScanCall, gates: Tensor, tokens: Tensor, initial: Tensor
) -> tuple[Tensor, Tensor]:
    assert call.cu_seqlens is not None
    starts, ends = call.cu_seqlens[:-1].long(), call.cu_seqlens[1:].long()
    if call.sequences == 0 or tokens.shape[0] == 0:
        return torch.zeros_like(tokens), initial
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    outside = (rows >= ends[-1])[:, None]
    owner = torch.searchsorted(ends, rows, right=True).clamp(max=call.sequences - 1)
    # Tokens after the last sequence become zeros before any arithmetic: the gradient of 0 * NaN is
    # NaN.
    x = tokens.masked_fill(outside, 0).unbind(0)
    g = [gates] * len(x) if gates.dim() == 1 else gates.masked_fill(outside, 0).unbind(0)
    enters = (rows == (ends[owner] - 1 if call.reverse else starts[owner])).unbind(0)
    entered = initial[owner].unbind(0)
    h, states = torch.zeros_like(x[0]), list(x)
    for t in _order(len(x), call.reverse):
        h = g[t] * torch.where(enters[t], entered[t], h) + x[t]
        states[t] = h
    stacked = torch.stack(states).masked_fill(outside, 0)
    last = starts if call.reverse else ends - 1
    left = stacked[last.clamp(0, tokens.shape[0] - 1)]
    return stacked, torch.where((starts == ends)[:, None], initial, left)

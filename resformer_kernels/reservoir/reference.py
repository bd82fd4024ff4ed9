"""Reservoirs in plain PyTorch: slow, obvious, and the definition of correct.

    h_t = (1 - a) h_{t-1} + a f(W h_{t-1} + W_in u_t + b)

Step after step, in float64 for float64 inputs and in float32 for all others, with weights widened
to that. It is differentiable by autograd as it stands, and has one mode, the sequential one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from resformer_kernels._core.gradient import seeing
from resformer_kernels._core.hardware import Hardware
from resformer_kernels.reservoir.record import (
    ACTIVATIONS,
    ReducedCall,
    ReservoirCall,
    ReservoirInfo,
)
from resformer_kernels.reservoir.reduction import Result, reduce_states

NAME = "reference"

_LARGE = 1024


def unsupported_reason(_call: ReducedCall, _hardware: Hardware) -> str | None:
    """None: the reference serves everything."""
    return None


def is_large(call: ReducedCall) -> bool:
    """Whether it takes enough steps to be worth a warning."""
    return call.scan.inputs.shape[-2] >= _LARGE


def run(call: ReducedCall) -> tuple[Result, Tensor, ReservoirInfo]:
    """(states or their reduction, final state, info)."""
    scan = call.scan
    with torch.autocast(scan.inputs.device.type, enabled=False):
        states, final_state = _scan(scan)
        result = reduce_states(states, final_state, scan.cu_seqlens, call.targets, call.reduce)
    one = scan.inputs.new_ones((), dtype=torch.float64)
    info = ReservoirInfo(one.long() * scan.sequences, one.long(), one * 0, one, one.bool())
    return result, final_state, info


def _scan(call: ReservoirCall) -> tuple[Tensor, Tensor]:
    step = step_of(call)
    inputs = call.inputs
    start = call.start()
    leaves = (inputs, call.weight, call.input_weight, call.leak, call.bias)
    if call.cu_seqlens is None:
        states, last = _sequence(step, inputs.transpose(0, 1), start)
        states = states.transpose(0, 1).contiguous()
        return (states, last) if states.numel() else (seeing(states, leaves), seeing(last, leaves))
    offsets = call.cu_seqlens.tolist()
    pieces, ends = [], []
    for i in range(call.sequences):
        piece = inputs[offsets[i] : offsets[i + 1], None]
        states, last = _sequence(step, piece, start[i : i + 1])
        pieces.append(states.flatten(0, 1))
        ends.append(last)
    pieces.append(inputs.new_zeros((inputs.shape[0] - offsets[-1], call.units)))
    states, last = torch.cat(pieces), torch.cat(ends) if ends else start.clone()
    return (states, last) if offsets[-1] else (seeing(states, leaves), seeing(last, leaves))


def _sequence(
    step: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """(states, last state) of inputs (T, B, n_in)."""
    states = []
    for t in range(inputs.shape[0]):
        state = step(state, inputs[t])
        states.append(state)
    if not states:
        return inputs.new_zeros((0, *state.shape)), state.clone()
    return torch.stack(states), state.clone()


def step_of(call: ReservoirCall) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of h_{t-1} (B, N) and u_t (B, n_in) that gives h_t."""
    dtype = call.inputs.dtype
    recur = _product(call)
    project = None if call.input_weight is None else call.input_weight.to(dtype)
    activate = _activation(call)
    leak = call.leak

    def step(state: Tensor, inputs: Tensor) -> Tensor:
        z = recur(state) + (inputs if project is None else inputs @ project.T)
        if call.bias is not None:
            z = z + call.bias
        updated: Tensor = (1 - leak) * state + leak * activate(z)
        return updated

    return step


def _activation(call: ReservoirCall) -> Callable[[Tensor], Tensor]:
    """f of z (..., N)."""
    groups = call.weight.shape[0] if call.weight.dim() == 3 else 1
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "tanh": torch.tanh,
        "relu": torch.relu,
        "identity": lambda z: z,
        "sigmoid": torch.sigmoid,
        # Not F.softplus, which is the identity above 20.
        "softplus": lambda z: -F.logsigmoid(-z),
        "softmax": lambda z: z.unflatten(-1, (groups, -1)).softmax(-1).flatten(-2),
    }
    return functions[ACTIVATIONS[call.activation]]


def _product(call: ReservoirCall) -> Callable[[Tensor], Tensor]:
    """The function h (..., N) -> W h, for a weight in any of its forms."""
    weight, columns = call.weight.to(call.inputs.dtype), call.columns
    if call.rows is not None and columns is not None:
        row_of = call.row_of()

        def sparse(h: Tensor) -> Tensor:
            terms = h.index_select(-1, columns) * weight
            return torch.zeros_like(h).index_add(-1, row_of, terms)

        return sparse
    if columns is not None:
        return lambda h: h.index_select(-1, columns) * weight
    if weight.dim() == 1:
        return lambda h: h * weight
    if weight.dim() == 2:
        return lambda h: h @ weight.T
    groups = weight.shape[0]
    return lambda h: torch.einsum(
        "gij,...gj->...gi", weight, h.unflatten(-1, (groups, -1))
    ).flatten(-2)

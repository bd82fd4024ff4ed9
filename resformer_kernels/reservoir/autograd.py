"""The gradient of a reservoir, around the ops of `ops.py`.

    adjoint_t = dL/dh_t = G_t + (1 - a) adjoint_{t+1} + Wᵀ (a f'(z_{t+1}) adjoint_{t+1})

Saved for backward: the inputs and the states. Everything else is computed again (`stretches.py`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core.old import (
    copy_note,
    distinct,
    needs_copy,
    refuse_forward_mode,
    run_backward,
    unit_stride,
    wants_gradient,
)
from resformer_kernels.reservoir.op import BACKWARD, FORWARD, NAME, REDUCED, VMAP_ERROR
from resformer_kernels.reservoir.record import ACTIVATIONS, MODES, ReservoirCall, ReservoirInfo
from resformer_kernels.reservoir.reduction import Result, reduce_states


class Options(NamedTuple):
    """The arguments of the ops that are no tensors, in the schema's order."""

    activation: int
    mode: int
    tolerance: float


def _op(namespace: str, name: str) -> Any:
    return getattr(getattr(torch.ops, namespace), name).default


def _arguments(*given: Any) -> tuple[Any, ...]:
    """What `ReservoirScan.apply` takes, in the schema's order."""
    inputs, weight, input_weight, leak, bias, initial_state, rows, columns, offsets, options = given
    tensors = (inputs, weight, rows, columns, input_weight, leak, bias, initial_state, offsets)
    return (*tensors, *options)


def forward_op(namespace: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op, on the arguments that `ReservoirScan.apply` takes."""
    result: tuple[Tensor, Tensor, Tensor] = _op(namespace, FORWARD)(*_arguments(*arguments))
    return result


def _backward_op(
    namespace: str,
    grad_states: Tensor | None,
    grad_final: Tensor | None,
    states: Tensor,
    grad_mask: int,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = _op(namespace, BACKWARD)(
        grad_states, grad_final, *_arguments(*arguments), states, grad_mask
    )
    return result


class ReservoirScan(torch.autograd.Function):
    """apply(namespace, inputs, weight, input_weight, leak, bias, initial_state, rows, columns,
    cu_seqlens, options) -> (states, final_state, info)."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return forward_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.namespace, *tensors, ctx.options = inputs
        states, _final_state, info = output
        ctx.save_for_backward(*tensors, states)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(info)

    @staticmethod
    def backward(
        ctx: Any, grad_states: Tensor | None, grad_final: Tensor | None, _info: Any
    ) -> tuple[Tensor | None, ...]:
        *tensors, states = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:7]
        mask = sum(1 << bit for bit, needed in enumerate(wanted) if needed)
        given = (ctx.namespace, grad_states, grad_final, states, mask)
        gradients = run_backward(NAME, _backward_op, *given, *tensors, ctx.options)
        found = [g if needed else None for g, needed in zip(gradients, wanted, strict=True)]
        return (None, *found, None, None, None, None)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(VMAP_ERROR)


def _leaves(call: ReservoirCall) -> tuple[Tensor | None, ...]:
    return (
        unit_stride(call.inputs),
        call.weight,
        call.input_weight,
        call.leak,
        call.bias,
        call.initial_state if call.initial_state is None else call.initial_state.contiguous(),
    )


def wants_states(call: ReservoirCall) -> bool:
    """Whether a gradient is wanted, which is computed from every state."""
    return wants_gradient((*_leaves(call), call.targets))


def run_op(call: ReservoirCall, namespace: str) -> tuple[Result, Tensor, ReservoirInfo]:
    """(states or their reduction, final state, info) of `call`, by the ops of `namespace`."""
    leaves = _leaves(call)
    offsets = None if call.cu_seqlens is None else call.cu_seqlens.contiguous()
    tensors: tuple[Any, ...] = (*leaves, call.rows, call.columns, offsets)
    options = Options(ACTIVATIONS.index(call.activation), MODES.index(call.mode), call.tolerance)
    if torch.compiler.is_compiling():
        tensors = distinct(tensors)
    else:
        refuse_forward_mode(NAME, (*leaves, call.targets))
    if call.reduce != "none" and not wants_states(call):
        first, second, final_state, info = _op(namespace, REDUCED)(
            *_arguments(*tensors, options), call.targets, call.reduce
        )
        return (first, second) if call.reduce == "gram" else first, final_state, _info(info)
    apply = ReservoirScan.apply if wants_gradient(leaves) else forward_op
    states, final_state, info = apply(namespace, *tensors, options)
    result = reduce_states(states, final_state, offsets, call.targets, call.reduce)
    return result, final_state, _info(info)


def _info(found: Tensor) -> ReservoirInfo:
    chunks, sweeps, mismatch, work, forgot = found.unbind()
    return ReservoirInfo(chunks.long(), sweeps.long(), mismatch.clone(), work.clone(), forgot > 0)


def notes(call: ReservoirCall) -> list[str]:
    """What `run_op` does to the arguments before the kernel, and keeps beside it."""
    found = [copy_note("inputs", call.inputs)] if needs_copy(call.inputs) else []
    if call.reduce != "none" and wants_states(call):
        found.append(f"every state is kept under reduce={call.reduce!r}: a gradient is wanted")
    return found

"""The reservoir's ops and their gradient; torch alone is needed.

`forward` and `adjoint` are kernels: the two recurrences. `backward` and `reduced` are made of those
of their namespace in Python, segment by segment of time; being ops, they are opaque to
torch.compile. A weight travels as its values, with `columns` for a permutation, and `rows` and
`columns` for CSR.

Saved for backward: the arguments and the states. Everything else is computed again.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core import dtensors
from resformer_kernels._core.gradient import (
    Parts,
    distinct,
    mask_of,
    refuse_forward_mode,
    run_backward,
    signed,
    wants_gradient,
)
from resformer_kernels._core.op import Op, vmap_error
from resformer_kernels._core.strides import copy_notes, with_unit_strides
from resformer_kernels.reservoir.record import (
    NAME,
    AdjointCall,
    BackwardCall,
    ReducedCall,
    ReservoirCall,
    ReservoirInfo,
)
from resformer_kernels.reservoir.reduction import Result, reduce_states

LEAVES = ("inputs", "weight", "input_weight", "leak", "bias", "initial_state")


def _info(like: Tensor) -> Tensor:
    return like.new_empty((len(ReservoirInfo._fields),), dtype=torch.float64)


def _forward_fake(call: ReservoirCall) -> tuple[Tensor, Tensor, Tensor]:
    inputs = call.inputs
    states = inputs.new_empty((*inputs.shape[:-1], call.units))
    return states, inputs.new_empty((call.sequences, call.units)), _info(inputs)


def _backward_fake(call: BackwardCall) -> tuple[Tensor, ...]:
    leaves = [getattr(call.scan, name) for name in LEAVES]
    return tuple(
        call.states.new_empty((0,))
        if leaf is None or not call.grad_mask >> bit & 1
        else leaf.new_empty(leaf.shape)
        for bit, leaf in enumerate(leaves)
    )


def _reduced_fake(call: ReducedCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, units = call.scan.inputs, call.scan.units
    final = inputs.new_empty((call.scan.sequences, units))
    if call.reduce != "gram":
        return final.new_empty(final.shape), inputs.new_empty((0,)), final, _info(inputs)
    outputs = 0 if call.targets is None else call.targets.shape[-1]
    gram = inputs.new_empty((units, units), dtype=torch.float64)
    return gram, gram.new_empty((units, outputs)), final, _info(inputs)


_LAUNCHERS = "resformer_kernels.reservoir.triton.recurrence"

FORWARD = Op(
    f"{NAME}_forward",
    ReservoirCall,
    "(Tensor states, Tensor final_state, Tensor info)",
    function=NAME,
    fake=_forward_fake,
    triton=f"{_LAUNCHERS}:forward",
)
ADJOINT = Op(
    f"{NAME}_adjoint",
    AdjointCall,
    "(Tensor adjoint, Tensor info)",
    function=NAME,
    fake=lambda call: (call.grad.new_empty(call.grad.shape), _info(call.grad)),
    triton=f"{_LAUNCHERS}:adjoint",
)
BACKWARD = Op(
    f"{NAME}_backward",
    BackwardCall,
    f"({', '.join(f'Tensor d{name}' for name in LEAVES)})",
    function=NAME,
    fake=_backward_fake,
    composed="resformer_kernels.reservoir.gradients:backward",
)
REDUCED = Op(
    f"{NAME}_reduced",
    ReducedCall,
    "(Tensor first, Tensor second, Tensor final_state, Tensor info)",
    function=NAME,
    fake=_reduced_fake,
    composed="resformer_kernels.reservoir.segments:reduced",
)
OPS = (FORWARD, ADJOINT, BACKWARD, REDUCED)


_PARTS = Parts(ReservoirCall, (*LEAVES, "rows", "columns", "cu_seqlens"))


class ReservoirScan(torch.autograd.Function):
    """apply(namespace, *parts of a ReservoirCall) -> (states, final_state, info)."""

    @staticmethod
    @signed
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        # One parameter: torch binds the signature at every call.
        namespace, rest, *tensors = arguments
        found: tuple[Tensor, Tensor, Tensor] = FORWARD(namespace, _PARTS.join(rest, tensors))
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.namespace, ctx.rest, *tensors = inputs
        states, _final_state, info = output
        ctx.save_for_backward(*tensors, states)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(info)

    @staticmethod
    def backward(
        ctx: Any, grad_states: Tensor | None, grad_final: Tensor | None, _info: Any
    ) -> tuple[Tensor | None, ...]:
        *tensors, states = ctx.saved_tensors
        scan = _PARTS.join(ctx.rest, tensors)
        needs = _PARTS.wanted(ctx, LEAVES)
        call = BackwardCall(grad_states, grad_final, scan, states, mask_of(needs))
        return _PARTS.in_place(LEAVES, run_backward(BACKWARD, ctx.namespace, call), needs)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(NAME))


def _leaves(call: ReservoirCall) -> tuple[Tensor | None, ...]:
    return tuple(getattr(call, name) for name in LEAVES)


def _needs_states(call: ReducedCall) -> bool:
    """Whether every state is kept under a reduction: a gradient is computed from them."""
    return call.reduce != "none" and wants_gradient((*_leaves(call.scan), call.targets))


def run(namespace: str, call: ReducedCall) -> tuple[Result, Tensor, ReservoirInfo]:
    """(states or their reduction, final state, info) of `call`, by the ops of `namespace`."""
    scan = with_unit_strides(call.scan, ("inputs",))
    for name in ("initial_state", "cu_seqlens"):
        given = getattr(scan, name)
        if given is not None and not given.is_contiguous():
            scan = scan._replace(**{name: given.contiguous()})
    if torch.compiler.is_compiling():
        scan = distinct(scan)
    leaves = _leaves(scan)
    if not torch.compiler.is_compiling():
        refuse_forward_mode(NAME, (*leaves, call.targets))
    if call.reduce != "none" and not _needs_states(call):
        first, second, final_state, info = REDUCED(namespace, call._replace(scan=scan))
        return (first, second) if call.reduce == "gram" else first, final_state, _read(info)
    if wants_gradient(leaves):
        states, final_state, info = ReservoirScan.apply(namespace, *_PARTS.split(scan))
    else:
        states, final_state, info = FORWARD(namespace, scan)
    result = reduce_states(states, final_state, scan.cu_seqlens, call.targets, call.reduce)
    return result, final_state, _read(info)


def _read(info: Tensor) -> ReservoirInfo:
    if dtensors.is_dtensor(type(info)):
        # Each rank chose for its own part.
        info = info.to_local()  # type: ignore[attr-defined]
    chunks, sweeps, mismatch, work, forgot = info.unbind()
    return ReservoirInfo(chunks.long(), sweeps.long(), mismatch.clone(), work.clone(), forgot > 0)


def notes(call: ReducedCall) -> list[str]:
    """Copies before the kernel, and memory beside it."""
    found = copy_notes(call.scan, ("inputs",))
    if call.scan.rows is not None:
        found.append(
            f"W is multiplied as CSR: {len(call.scan.weight)} of {call.scan.units}² entries"
        )
    if _needs_states(call):
        found.append(f"every state is kept under reduce={call.reduce!r}: a gradient is wanted")
    return found

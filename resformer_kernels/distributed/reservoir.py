"""`reservoir_scan` on a sequence that is split across ranks: `sweeps.py` is its forward,
`adjoint.py` its backward. Every rank keeps the states of its own steps, under a reduction too:
later sweeps compare with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core import gradient
from resformer_kernels._core.gradient import Parts
from resformer_kernels._core.op import NATIVE, TRITON, Op, vmap_error
from resformer_kernels._core.select import select
from resformer_kernels._core.strides import with_unit_strides
from resformer_kernels.distributed.adjoint import Adjoint
from resformer_kernels.distributed.split import Split
from resformer_kernels.distributed.sweeps import Sweeper, at_once
from resformer_kernels.reservoir.op import LEAVES
from resformer_kernels.reservoir.record import (
    NAME,
    SEQUENTIAL,
    ReducedCall,
    ReservoirCall,
    ReservoirInfo,
)
from resformer_kernels.reservoir.reduction import Result, reduce_states

_NAMESPACES = {"native": NATIVE, "triton": TRITON, "reference": ""}
_PARTS = Parts(ReservoirCall, (*LEAVES, "rows", "columns", "cu_seqlens"))


class SplitReservoirCall(NamedTuple):
    """A scan of this rank's part; `split` names who holds what."""

    split: str
    scan: ReservoirCall


class SplitBackwardCall(NamedTuple):
    """`before` and `info` are results of the forward op. Bit i of grad_mask: leaf i of LEAVES wants
    a gradient."""

    grad_states: Tensor | None
    grad_final: Tensor | None
    split: str
    scan: ReservoirCall
    states: Tensor
    before: Tensor
    info: Tensor
    grad_mask: int


def _forward_fake(call: SplitReservoirCall) -> tuple[Tensor, ...]:
    scan = call.scan
    inputs, state = scan.inputs, (scan.sequences, scan.units)
    return (
        inputs.new_empty((*inputs.shape[:-1], scan.units)),
        inputs.new_empty(state),
        inputs.new_empty((len(ReservoirInfo._fields),), dtype=torch.float64),
        inputs.new_empty((2, *state)),
    )


def _backward_fake(call: SplitBackwardCall) -> tuple[Tensor, ...]:
    leaves = [getattr(call.scan, name) for name in LEAVES]
    return tuple(
        call.states.new_empty((0,))
        if leaf is None or not call.grad_mask >> bit & 1
        else leaf.new_empty(leaf.shape)
        for bit, leaf in enumerate(leaves)
    )


# Ops, so that torch.compile sees one step where ranks exchange as often as it takes.
FORWARD = Op(
    "split_reservoir_forward",
    SplitReservoirCall,
    "(Tensor states, Tensor final_state, Tensor info, Tensor before)",
    function=NAME,
    fake=_forward_fake,
    composed="resformer_kernels.distributed.reservoir:forward",
)
BACKWARD = Op(
    "split_reservoir_backward",
    SplitBackwardCall,
    f"({', '.join(f'Tensor d{name}' for name in LEAVES)})",
    function=NAME,
    fake=_backward_fake,
    composed="resformer_kernels.distributed.reservoir:backward",
)


def serve(
    split: Split, backend: str, backends: Sequence[Any], call: ReducedCall
) -> tuple[Result, Tensor, ReservoirInfo]:
    """(this rank's states, or the reduction of all ranks'; final state and info of all ranks)."""
    scan = call.scan
    if scan.cu_seqlens is not None:
        raise RuntimeError(
            f"{NAME} with cu_seqlens cannot run under context_parallel: pass sequences of one "
            "length, (batch, time, inputs)"
        )
    split.check("inputs", scan.inputs.shape[1])
    namespace = _NAMESPACES[select(NAME, backend, backends, _as_run(call)).NAME]
    scan = _contiguous(scan)
    leaves = [getattr(scan, name) for name in LEAVES]
    if torch.compiler.is_compiling():
        scan = gradient.distinct(scan)
    else:
        gradient.refuse_forward_mode(NAME, (*leaves, call.targets))
    if gradient.wants_gradient(leaves):
        parts = _PARTS.split(scan)
        states, final, info, _ = _Reservoir.apply(namespace, (split.name, *parts[0]), *parts[1:])
    else:
        states, final, info, _ = _forward(namespace, SplitReservoirCall(split.name, scan))
    chunks, sweeps, mismatch, work, forgot = info.unbind()
    told = ReservoirInfo(chunks.long(), sweeps.long(), mismatch.clone(), work.clone(), forgot > 0)
    return _reduced(split, call, states, final), final, told


def _as_run(call: ReducedCall) -> ReducedCall:
    """A call that is as those of this rank, by metadata: its pieces packed, with all states."""
    scan = call.scan
    offsets = scan.inputs.new_empty((2 * scan.sequences + 1,), dtype=torch.int32)
    return ReducedCall(
        scan._replace(inputs=scan.inputs.flatten(0, 1), cu_seqlens=offsets), "none", None
    )


def _contiguous(call: ReservoirCall) -> ReservoirCall:
    call = with_unit_strides(call, ("inputs",))
    if call.initial_state is None:
        return call
    return call._replace(initial_state=call.initial_state.contiguous())


def _forward(namespace: str, call: SplitReservoirCall) -> tuple[Tensor, ...]:
    return tuple(FORWARD(namespace, call)) if namespace else forward("", call)


def _reduced(split: Split, call: ReducedCall, states: Tensor, final: Tensor) -> Result:
    """The reduction of the states of all ranks."""
    if call.reduce in ("none", "last"):
        return reduce_states(states, final, None, None, call.reduce)
    if call.reduce == "mean":
        total: Tensor = _Sum.apply(split, states.sum(1, dtype=torch.float64))
        return (total / max(split.deal.length, 1)).to(states.dtype)
    found = reduce_states(states, final, None, call.targets, call.reduce)
    sums: Tensor = _Sum.apply(split, torch.cat(tuple(found), 1))
    gram, cross = sums.split([part.shape[1] for part in found], 1)
    return gram.contiguous(), cross.contiguous()


class _Sum(torch.autograd.Function):
    """apply(split, x) -> the sum over ranks, which every rank has, and whose uses all count."""

    @staticmethod
    def forward(ctx: Any, split: Split, x: Tensor) -> Tensor:
        ctx.split = split
        return split.ranks.sum("sums", x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, ctx.split.ranks.sum("dsums", grad)


class _Reservoir(torch.autograd.Function):
    """apply(namespace, (split, *rest), *parts of a call) -> (states, final state, info, before)."""

    @staticmethod
    @gradient.signed
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        namespace, (split, *rest), *tensors = arguments
        return _forward(namespace, SplitReservoirCall(split, _PARTS.join(rest, tensors)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.namespace, (ctx.split, *ctx.rest), *tensors = inputs
        states, _final, info, before = output
        ctx.save_for_backward(*tensors, states, before, info)
        ctx.mark_non_differentiable(info, before)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, grad_states: Tensor | None, grad_final: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        *tensors, states, before, info = ctx.saved_tensors
        scan, needs = _PARTS.join(ctx.rest, tensors), _PARTS.wanted(ctx, LEAVES)
        given = (grad_states, grad_final, ctx.split, scan, states, before, info)
        call = SplitBackwardCall(*given, gradient.mask_of(needs))
        if ctx.namespace:
            found = gradient.run_backward(BACKWARD, ctx.namespace, call)
        else:
            leaves = (grad_states, grad_final, *ctx.saved_tensors)
            found = gradient.once(NAME, lambda *_: backward("", call), leaves)
        return _PARTS.in_place(LEAVES, found, needs)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(NAME))


def forward(namespace: str, call: SplitReservoirCall) -> tuple[Tensor, ...]:
    """The op `split_reservoir_forward`: (states, final state, info, the states before this rank's
    pieces), by the ops of `namespace`; empty: the reference."""
    sweeper = Sweeper(Split.named(call.split), namespace, call.scan)
    return *sweeper.run(), sweeper.before()


def backward(namespace: str, given: SplitBackwardCall) -> tuple[Tensor, ...]:
    """The op `split_reservoir_backward`: the gradients of LEAVES, empty where not wanted."""
    split, scan = Split.named(given.split), given.scan
    # What does not forget goes back in order too.
    together = at_once(split, scan) and bool(given.info[ReservoirInfo._fields.index("forgot")])
    if not together:
        scan = scan._replace(mode=SEQUENTIAL)
    adjoint = Adjoint(namespace, split, scan, given)
    grad_final = given.grad_final
    if grad_final is None:
        grad_final = torch.zeros_like(given.before[0])
    if together:
        adjoint.at_once(grad_final)
    else:
        adjoint.in_order(grad_final)
    return adjoint.leaves()

"""Ring attention as an op, with its gradient.

An op, so that torch.compile sees one step where the ranks exchange many: a graph may drop or
reorder exchanges that one rank has no need of, and another waits for. Saved for backward: the
inputs, y and the LSE.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

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
from resformer_kernels._core.strides import with_unit_strides
from resformer_kernels.attention.record import FIXED

LEAVES = ("q", "k", "v", "v_first", "lambda_v", "lambda_first", "sinks", "whole")
"""Arguments that have gradients, in the order of the backward op's results and of `grad_mask`."""


class RingCall(NamedTuple):
    """A call of attention on this rank's part; names as in `AttentionCall`.

    `split` names who holds what (`Split.named`). Values are those of this rank, or `whole`: those
    of every rank, (ranks, B, longest T, Hkv, Dv).
    """

    split: str
    q: Tensor
    k: Tensor
    v: Tensor | None
    v_first: Tensor | None
    lambda_v: Tensor | None
    lambda_first: Tensor | None
    sinks: Tensor | None
    whole: Tensor | None
    lambda_v_value: float
    lambda_first_value: float
    window_left: int
    window_right: int
    scale: float
    softcap: float
    return_lse: bool
    return_mixed_value: bool

    @property
    def window(self) -> tuple[int, int]:
        """(left, right), in positions of the whole sequence."""
        return self.window_left, self.window_right

    @property
    def value(self) -> Tensor:
        """A source of V', whose last axis is Dv."""
        value = self.whole if self.v is None else self.v
        assert value is not None
        return value


class RingBackwardCall(NamedTuple):
    """The arguments of the backward op. Bit i of grad_mask: leaf i of `LEAVES` wants a gradient."""

    grad_y: Tensor
    grad_lse: Tensor | None
    grad_mixed: Tensor | None
    call: RingCall
    y: Tensor
    lse: Tensor
    grad_mask: int

    def wanted(self) -> dict[str, bool]:
        """Which leaves want a gradient."""
        return {name: bool(self.grad_mask >> bit & 1) for bit, name in enumerate(LEAVES)}

    def results(self, found: dict[str, Tensor | None]) -> tuple[Tensor, ...]:
        """The op's results of the gradients that were found, in their leaves' dtypes."""
        gradients = []
        for name, wanted in self.wanted().items():
            leaf, gradient = getattr(self.call, name), found.get(name)
            if leaf is None or gradient is None or not wanted:
                gradients.append((self.call.q if leaf is None else leaf).new_empty((0,)))
            else:
                gradients.append(gradient.to(leaf.dtype).contiguous())
        return tuple(gradients)


def _forward_fake(call: RingCall) -> tuple[Tensor, Tensor, Tensor]:
    q, value = call.q, call.value
    batch, time, heads, _ = q.shape
    return (
        q.new_empty((*q.shape[:-1], value.shape[-1])),
        q.new_empty((batch, heads, time), dtype=torch.float32),
        value.new_empty(value.shape if call.return_mixed_value and call.v is not None else (0,)),
    )


def _backward_fake(given: RingBackwardCall) -> tuple[Tensor, ...]:
    leaves = {name: getattr(given.call, name) for name in LEAVES}
    return given.results({n: x if x is None else x.new_empty(x.shape) for n, x in leaves.items()})


FORWARD = Op(
    "ring_attention_forward",
    RingCall,
    "(Tensor y, Tensor lse, Tensor mixed)",
    function=FIXED,
    fake=_forward_fake,
    composed="resformer_kernels.distributed.ring:forward",
)
BACKWARD = Op(
    "ring_attention_backward",
    RingBackwardCall,
    f"({', '.join(f'Tensor d{name}' for name in LEAVES)})",
    function=FIXED,
    fake=_backward_fake,
    composed="resformer_kernels.distributed.ring:backward",
)

_PARTS = Parts(RingCall, LEAVES)


class RingAttention(torch.autograd.Function):
    """apply(namespace, *parts of a call) -> (y, LSE, V' of this rank, empty if not asked for)."""

    @staticmethod
    @signed
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        # One parameter: torch binds the signature at every call.
        namespace, rest, *tensors = arguments
        y, lse, mixed = FORWARD(namespace, _PARTS.join(rest, tensors))
        return y, lse, mixed

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.namespace, ctx.rest, *tensors = inputs
        y, lse, mixed = output
        call = _PARTS.join(ctx.rest, tensors)
        # Checkpointing compares what a layer saves when it runs again: outside the context it saves
        # no such tensor, and is refused instead of attending to this rank's keys alone.
        mark = y.new_empty((0, 1, 2, 3, 4))
        ctx.save_for_backward(mark, *tensors, y, lse)
        ctx.set_materialize_grads(False)
        unwanted = [*([] if call.return_lse else [lse]), *([] if mixed.numel() else [mixed])]
        ctx.mark_non_differentiable(*unwanted)

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_lse: Tensor | None, grad_mixed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _mark, *tensors, y, lse = ctx.saved_tensors
        call = _PARTS.join(ctx.rest, tensors)
        needs = _PARTS.wanted(ctx, LEAVES)
        # torch.compile materialises the gradients of outputs that were marked not differentiable.
        given = RingBackwardCall(
            grad_y=torch.zeros_like(y) if grad_y is None else grad_y,
            grad_lse=grad_lse if call.return_lse else None,
            grad_mixed=grad_mixed if call.return_mixed_value and call.v is not None else None,
            call=call,
            y=y,
            lse=lse,
            grad_mask=mask_of(needs),
        )
        gradients = run_backward(BACKWARD, ctx.namespace, given)
        return _PARTS.in_place(LEAVES, gradients, needs)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(FIXED))


def run(namespace: str, call: RingCall) -> tuple[Tensor, Tensor, Tensor]:
    """(y, LSE, V' of this rank or empty) by the ops of `namespace`."""
    call = with_unit_strides(call, ("q", "k", "v", "v_first"))
    leaves = [getattr(call, name) for name in LEAVES]
    if torch.compiler.is_compiling():
        call = distinct(call)
    else:
        refuse_forward_mode(FIXED, leaves)
    found: tuple[Tensor, Tensor, Tensor]
    if wants_gradient(leaves):
        found = RingAttention.apply(namespace, *_PARTS.split(call))
    else:
        found = FORWARD(namespace, call)
    return found

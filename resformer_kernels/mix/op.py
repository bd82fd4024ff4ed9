"""The mixing ops and their gradients; torch alone is needed.

    dV_i = c_i * dOut           dc_i   = dOut * V_i, summed over the axes along which c_i broadcasts
    dv   = dOut                 dtable[id] = sum of gate * dOut over the positions that hold id
                                dgate  = dOut * table[token_ids], summed likewise

A value is saved only where its coefficient wants a gradient. An embedding saves the table and the
ids; the selected rows are read again. A gradient that is not wanted has shape (0,).
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core import gradient
from resformer_kernels._core.op import Op, vmap_error
from resformer_kernels._core.strides import unit_stride, with_unit_strides
from resformer_kernels.mix.record import (
    COPIED,
    EMBEDDING,
    VALUES,
    EmbeddingCall,
    MixCall,
    absent_like,
)

WANTS_TABLE, WANTS_GATE = 1, 2
"""Bits of an embedding's `grad_mask`."""


class MixBackwardCall(NamedTuple):
    """A value is absent where its coefficient's gradient is not wanted. `grad_mask` says which
    values, then which coefficients want one."""

    grad: Tensor
    call: MixCall
    grad_mask: tuple[int, ...]


class EmbeddingBackwardCall(NamedTuple):
    """v has no part in the gradients of the table and the gate."""

    grad: Tensor
    table: Tensor
    token_ids: Tensor
    gate: Tensor | None
    gate_value: float


class DenseBackwardCall(NamedTuple):
    """The table's gradient is dense. `grad_mask` says which of table and gate want one."""

    call: EmbeddingBackwardCall
    grad_mask: int


def _forward_fake(call: MixCall | EmbeddingCall) -> Tensor:
    return call.like.new_empty(call.like.shape)


def _values_backward_fake(back: MixBackwardCall) -> list[Tensor]:
    leaves = [*[back.grad] * len(back.call.values), *back.call.coefficients]
    return [
        leaf.new_empty(leaf.shape if wanted else (0,))
        for leaf, wanted in zip(leaves, back.grad_mask, strict=True)
    ]


def _dense_fake(back: DenseBackwardCall) -> tuple[Tensor, ...]:
    gate = back.call.grad if back.call.gate is None else back.call.gate
    return tuple(
        leaf.new_empty(leaf.shape if back.grad_mask & bit else (0,))
        for bit, leaf in ((WANTS_TABLE, back.call.table), (WANTS_GATE, gate))
    )


def _sparse_fake(back: EmbeddingBackwardCall) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size()
    ids = back.token_ids.new_empty((count,), dtype=torch.int64)
    return ids, back.table.new_empty((count, *back.table.shape[1:]))


_TRITON = "resformer_kernels.mix.triton"
VALUES_FORWARD = Op(
    f"{VALUES}_forward",
    MixCall,
    "Tensor",
    function=VALUES,
    fake=_forward_fake,
    triton=f"{_TRITON}.forward:mix_values_forward",
)
VALUES_BACKWARD = Op(
    f"{VALUES}_backward",
    MixBackwardCall,
    "Tensor[]",
    function=VALUES,
    fake=_values_backward_fake,
    triton=f"{_TRITON}.backward:mix_values_backward",
)
EMBEDDING_FORWARD = Op(
    f"{EMBEDDING}_forward",
    EmbeddingCall,
    "Tensor",
    function=EMBEDDING,
    fake=_forward_fake,
    triton=f"{_TRITON}.forward:mix_value_embedding_forward",
)
EMBEDDING_BACKWARD = Op(
    f"{EMBEDDING}_backward",
    DenseBackwardCall,
    "(Tensor dtable, Tensor dgate)",
    function=EMBEDDING,
    fake=_dense_fake,
    triton=f"{_TRITON}.scatter:mix_value_embedding_backward",
)
EMBEDDING_SPARSE = Op(
    f"{EMBEDDING}_backward_sparse",
    EmbeddingBackwardCall,
    "(Tensor ids, Tensor rows)",
    function=EMBEDDING,
    fake=_sparse_fake,
    triton=f"{_TRITON}.scatter:mix_value_embedding_backward_sparse",
)
OPS = (VALUES_FORWARD, VALUES_BACKWARD, EMBEDDING_FORWARD, EMBEDDING_BACKWARD, EMBEDDING_SPARSE)


def _flat(call: MixCall) -> tuple[Any, ...]:
    """The call without lists, in which autograd looks for no tensors."""
    return (call.coefficient_values, *call.values, *call.coefficients)


def _call_of(numbers: tuple[float, ...], *tensors: Tensor) -> MixCall:
    """The inverse of `_flat`."""
    return MixCall(tensors[: len(numbers)], tensors[len(numbers) :], numbers)


class MixValues(torch.autograd.Function):
    """apply(namespace, coefficient_values, *values, *coefficients) -> out."""

    @staticmethod
    @gradient.signed
    def forward(*arguments: Any) -> Tensor:
        # One parameter: torch binds the signature at every call.
        namespace, *flat = arguments
        out: Tensor = VALUES_FORWARD(namespace, _call_of(*flat))
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.namespace, ctx.numbers, *tensors = inputs
        count = len(ctx.numbers)
        needs = ctx.needs_input_grad[2 + count :]
        values = [x if need else None for x, need in zip(tensors[:count], needs, strict=True)]
        ctx.save_for_backward(*values, *tensors[count:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = [absent_like(grad) if x is None else x for x in ctx.saved_tensors]
        needs = ctx.needs_input_grad[2:]
        mask = tuple(int(need) for need in needs)
        back = MixBackwardCall(unit_stride(grad), _call_of(ctx.numbers, *tensors), mask)
        # A value's gradient is that of one call of its shape: no sum over ranks.
        leaves = (*[None] * len(ctx.numbers), *back.call.coefficients)
        gradients = gradient.run_backward(VALUES_BACKWARD, ctx.namespace, back, leaves)
        found = (g if need else None for g, need in zip(gradients, needs, strict=True))
        return (None, None, *found)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(VALUES))


class MixValueEmbedding(torch.autograd.Function):
    """apply(namespace, *call) -> out."""

    @staticmethod
    @gradient.signed
    def forward(*arguments: Any) -> Tensor:
        namespace, *call = arguments
        out: Tensor = EMBEDDING_FORWARD(namespace, call)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.namespace, _v, table, token_ids, gate, ctx.gate_value, ctx.sparse_grad = inputs
        ctx.save_for_backward(table, token_ids, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, token_ids, gate = ctx.saved_tensors
        call = EmbeddingBackwardCall(unit_stride(grad), table, token_ids, gate, ctx.gate_value)
        leaves = ("v", "table", "gate")
        needs = gradient.wanted(ctx, EmbeddingCall, leaves)
        d_table: Tensor | None = None
        d_gate: Tensor | None = None
        dense = gradient.mask_of((needs[1] and not ctx.sparse_grad, needs[2]))
        if dense:
            back = DenseBackwardCall(call, dense)
            d_table, d_gate = gradient.run_backward(EMBEDDING_BACKWARD, ctx.namespace, back)
        if needs[1] and ctx.sparse_grad:
            ids, rows = gradient.run_backward(EMBEDDING_SPARSE, ctx.namespace, call)
            d_table = torch.sparse_coo_tensor(
                ids[None], rows, table.shape, is_coalesced=True, check_invariants=False
            )
        return gradient.in_place_of(EmbeddingCall, leaves, (grad, d_table, d_gate), needs)

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(EMBEDDING))


def run(namespace: str, call: MixCall | EmbeddingCall) -> Tensor:
    """The mixed value by the ops of `namespace`, contiguous, in the values' shape and dtype."""
    if isinstance(call, EmbeddingCall):
        call = with_unit_strides(call, COPIED)
        return _run(namespace, EMBEDDING_FORWARD, MixValueEmbedding, call, call)
    values = tuple(unit_stride(x) for x in call.values)
    call = MixCall(values, call.coefficients, call.coefficient_values)
    return _run(namespace, VALUES_FORWARD, MixValues, call, _flat(call))


def _run(namespace: str, op: Op, function: Any, call: Any, arguments: Any) -> Tensor:
    leaves = [x for x in arguments if isinstance(x, Tensor)]
    if torch.compiler.is_compiling():
        arguments = gradient.distinct(arguments)
    else:
        gradient.refuse_forward_mode(op.function, leaves)
    wants = gradient.wants_gradient(leaves)
    out: Tensor = function.apply(namespace, *arguments) if wants else op(namespace, call)
    return out

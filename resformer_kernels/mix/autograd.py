"""The gradients of the mixing ops, around the ops of `ops.py`.

    dV_i = c_i * dOut           dc_i   = dOut * V_i, summed over the axes along which c_i broadcasts
    dv   = dOut                 dtable[id] = sum of gate * dOut over the positions that hold id
                                dgate  = dOut * table[token_ids], summed likewise

A value is saved only where its coefficient wants a gradient. Of an embedding, the table and the
ids are saved; the rows they pick are read again.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from resformer_kernels._core.old import (
    copy_note,
    distinct,
    needs_copy,
    refuse_forward_mode,
    run_backward,
    unit_stride,
    vmap_error,
    wants_gradient,
)
from resformer_kernels.mix.op import EMBEDDING, VALUES
from resformer_kernels.mix.record import EmbeddingCall, MixCall


def _op(namespace: str, name: str) -> Any:
    return getattr(getattr(torch.ops, namespace), name).default


def _listed(tensors: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    return [like.new_empty((0,)) if x is None else x for x in tensors]


def values_op(namespace: str, numbers: tuple[float, ...], *tensors: Tensor | None) -> Tensor:
    """The forward op, on the arguments that `MixValues.apply` takes."""
    count = len(numbers)
    values: Any = tensors[:count]
    result: Tensor = _op(namespace, "mix_values_forward")(
        values, _listed(tensors[count:], values[0]), numbers
    )
    return result


def _values_backward_op(
    namespace: str,
    numbers: tuple[float, ...],
    mask: list[int],
    grad: Tensor,
    *tensors: Tensor | None,
) -> list[Tensor]:
    count = len(numbers)
    result: list[Tensor] = _op(namespace, "mix_values_backward")(
        grad, _listed(tensors[:count], grad), _listed(tensors[count:], grad), numbers, mask
    )
    return result


class MixValues(torch.autograd.Function):
    """apply(namespace, numbers, *values, *coefficients) -> out, by the ops of that namespace; a
    coefficient is None where its number is."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return values_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.namespace, ctx.numbers, *tensors = inputs
        count = len(ctx.numbers)
        wanted = ctx.needs_input_grad[2 + count :]
        kept = [x if need else None for x, need in zip(tensors[:count], wanted, strict=True)]
        ctx.save_for_backward(*kept, *tensors[count:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        mask = [int(need) for need in wanted]
        options = (ctx.namespace, ctx.numbers, mask)
        gradients = run_backward(VALUES, _values_backward_op, *options, unit_stride(grad), *tensors)
        return (
            None,
            None,
            *(g if need else None for g, need in zip(gradients, wanted, strict=True)),
        )

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(VALUES))


def embedding_op(
    namespace: str, gate_value: float, _sparse_grad: bool, *tensors: Tensor | None
) -> Tensor:
    """The forward op, on the arguments that `MixValueEmbedding.apply` takes."""
    result: Tensor = _op(namespace, "mix_value_embedding_forward")(*tensors, gate_value)
    return result


def _embedding_backward_op(
    namespace: str,
    gate_value: float,
    mask: int,
    grad: Tensor,
    table: Tensor,
    token_ids: Tensor,
    gate: Tensor | None,
) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = _op(namespace, "mix_value_embedding_backward")(
        grad, table, token_ids, gate, gate_value, mask
    )
    return result


def _sparse_backward_op(
    namespace: str,
    gate_value: float,
    grad: Tensor,
    table: Tensor,
    token_ids: Tensor,
    gate: Tensor | None,
) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = _op(namespace, "mix_value_embedding_backward_sparse")(
        grad, table, token_ids, gate, gate_value
    )
    return result


class MixValueEmbedding(torch.autograd.Function):
    """apply(namespace, gate_value, sparse_grad, v, table, token_ids, gate) -> out."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return embedding_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.namespace, ctx.gate_value, ctx.sparse_grad, _v, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, token_ids, gate = ctx.saved_tensors
        _, _, _, v_wanted, table_wanted, _, gate_wanted = ctx.needs_input_grad
        options = (ctx.namespace, ctx.gate_value)
        saved = (unit_stride(grad), table, token_ids, gate)
        rows: Tensor | None = None
        if table_wanted and ctx.sparse_grad:
            ids, picked = run_backward(EMBEDDING, _sparse_backward_op, *options, *saved)
            rows = torch.sparse_coo_tensor(
                ids[None], picked, table.shape, is_coalesced=True, check_invariants=False
            )
        mask = (1 if table_wanted and not ctx.sparse_grad else 0) | (2 if gate_wanted else 0)
        dense: Tensor | None = None
        d_gate: Tensor | None = None
        if mask:
            dense, d_gate = run_backward(EMBEDDING, _embedding_backward_op, *options, mask, *saved)
        return (
            None,
            None,
            None,
            grad if v_wanted else None,
            rows if ctx.sparse_grad else (dense if table_wanted else None),
            None,
            d_gate if gate_wanted else None,
        )

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(EMBEDDING))


def run_op(call: MixCall | EmbeddingCall, namespace: str) -> Tensor:
    """The mixed value, by the ops of `namespace`."""
    if isinstance(call, MixCall):
        leaves = (*(unit_stride(x) for x in call.values), *call.coefficients)
        return _apply(MixValues, values_op, VALUES, (namespace, call.coefficient_values), leaves)
    options = (namespace, call.gate_value, call.sparse_grad)
    leaves = (unit_stride(call.v), unit_stride(call.table), call.token_ids, call.gate)
    return _apply(MixValueEmbedding, embedding_op, EMBEDDING, options, leaves)


def _apply(
    function: Any, op: Any, name: str, options: tuple[Any, ...], leaves: tuple[Tensor | None, ...]
) -> Tensor:
    if torch.compiler.is_compiling():
        leaves = distinct(leaves)
    else:
        refuse_forward_mode(name, leaves)
    out: Tensor = (function.apply if wants_gradient(leaves) else op)(*options, *leaves)
    return out


def copy_notes(call: MixCall | EmbeddingCall) -> list[str]:
    """What `run_op` does to the arguments before the kernel."""
    if isinstance(call, MixCall):
        named = [(f"values[{i}]", value) for i, value in enumerate(call.values)]
    else:
        named = [("v", call.v), ("table", call.table)]
    return [copy_note(name, tensor) for name, tensor in named if needs_copy(tensor)]

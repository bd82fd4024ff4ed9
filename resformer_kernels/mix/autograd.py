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

from resformer_kernels._launch import run_backward, unit_stride, vmap_error
from resformer_kernels.mix.ops import EMBEDDING, VALUES


def _listed(tensors: tuple[Tensor | None, ...], like: Tensor) -> list[Tensor]:
    return [like.new_empty((0,)) if x is None else x for x in tensors]


def values_op(numbers: tuple[float, ...], *tensors: Tensor | None) -> Tensor:
    """The forward op, on the arguments that `MixValues.apply` takes."""
    count = len(numbers)
    values: Any = tensors[:count]
    result: Tensor = torch.ops.resformer.mix_values_forward.default(
        values, _listed(tensors[count:], values[0]), numbers
    )
    return result


def _values_backward_op(
    numbers: tuple[float, ...], mask: list[int], grad: Tensor, *tensors: Tensor | None
) -> list[Tensor]:
    count = len(numbers)
    result: list[Tensor] = torch.ops.resformer.mix_values_backward.default(
        grad, _listed(tensors[:count], grad), _listed(tensors[count:], grad), numbers, mask
    )
    return result


class MixValues(torch.autograd.Function):
    """apply(numbers, *values, *coefficients) -> out; a coefficient is None where its number is."""

    @staticmethod
    def forward(numbers: tuple[float, ...], *tensors: Tensor | None) -> Tensor:
        return values_op(numbers, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        numbers, *tensors = inputs
        count = len(numbers)
        ctx.numbers = numbers
        wanted = ctx.needs_input_grad[1 + count :]
        kept = [x if need else None for x, need in zip(tensors[:count], wanted, strict=True)]
        ctx.save_for_backward(*kept, *tensors[count:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        mask = [int(need) for need in wanted]
        gradients = run_backward(
            VALUES, _values_backward_op, ctx.numbers, mask, unit_stride(grad), *tensors
        )
        return (None, *(g if need else None for g, need in zip(gradients, wanted, strict=True)))

    @staticmethod
    def vmap(*_arguments: Any) -> NoReturn:
        raise RuntimeError(vmap_error(VALUES))


def embedding_op(gate_value: float, _sparse_grad: bool, *tensors: Tensor | None) -> Tensor:
    """The forward op, on the arguments that `MixValueEmbedding.apply` takes."""
    result: Tensor = torch.ops.resformer.mix_value_embedding_forward.default(*tensors, gate_value)
    return result


def _embedding_backward_op(
    gate_value: float,
    mask: int,
    grad: Tensor,
    table: Tensor,
    token_ids: Tensor,
    gate: Tensor | None,
) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = torch.ops.resformer.mix_value_embedding_backward.default(
        grad, table, token_ids, gate, gate_value, mask
    )
    return result


def _sparse_backward_op(
    gate_value: float, grad: Tensor, table: Tensor, token_ids: Tensor, gate: Tensor | None
) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = torch.ops.resformer.mix_value_embedding_backward_sparse.default(
        grad, table, token_ids, gate, gate_value
    )
    return result


class MixValueEmbedding(torch.autograd.Function):
    """apply(gate_value, sparse_grad, v, table, token_ids, gate) -> out."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return embedding_op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        ctx.gate_value, ctx.sparse_grad, _v, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, token_ids, gate = ctx.saved_tensors
        _, _, v_wanted, table_wanted, _, gate_wanted = ctx.needs_input_grad
        saved = (unit_stride(grad), table, token_ids, gate)
        rows: Tensor | None = None
        if table_wanted and ctx.sparse_grad:
            ids, picked = run_backward(EMBEDDING, _sparse_backward_op, ctx.gate_value, *saved)
            rows = torch.sparse_coo_tensor(
                ids[None], picked, table.shape, is_coalesced=True, check_invariants=False
            )
        mask = (1 if table_wanted and not ctx.sparse_grad else 0) | (2 if gate_wanted else 0)
        dense: Tensor | None = None
        d_gate: Tensor | None = None
        if mask:
            dense, d_gate = run_backward(
                EMBEDDING, _embedding_backward_op, ctx.gate_value, mask, *saved
            )
        return (
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

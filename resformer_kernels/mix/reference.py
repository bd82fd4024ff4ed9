"""The mixing ops in plain PyTorch: slow, obvious, and the definition of correct.

    out = sum_i c_i * V_i               out = v + gate * table[token_ids]

They compute in float64 for float64 inputs and in float32 for all others, in the order in which the
sources are given, and round once. They are differentiable by autograd as they stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.hardware import Hardware
from resformer_kernels.mix.record import EmbeddingCall, MixCall

NAME = "reference"

_LARGE = 2**24


def unsupported_reason(_call: MixCall | EmbeddingCall, _hardware: Hardware) -> str | None:
    """None: the reference serves everything."""
    return None


def is_large(call: MixCall | EmbeddingCall) -> bool:
    """Whether it makes enough float32 copies of V to be worth a warning."""
    return call.like.numel() >= _LARGE


def run(call: MixCall | EmbeddingCall) -> Tensor:
    """The mixed value, contiguous, in the values' shape and dtype."""
    with torch.autocast(call.like.device.type, enabled=False):
        mixed = _mix(call) if isinstance(call, MixCall) else _embed(call)
        return mixed.to(call.like.dtype).contiguous()


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _mix(call: MixCall) -> Tensor:
    compute = _compute_dtype(call.values[0].dtype)
    total: Tensor | None = None
    for value, tensor, number in call.terms:
        term = (number if tensor is None else tensor.to(compute)) * value.to(compute)
        total = term if total is None else total + term
    assert total is not None
    return total


def _embed(call: EmbeddingCall) -> Tensor:
    compute = _compute_dtype(call.v.dtype)
    take: Any = _TakeRows.apply if call.sparse_grad else _take_rows
    rows = take(call.table, call.token_ids).to(compute)
    gate = call.gate_value if call.gate is None else call.gate.to(compute)
    return call.v.to(compute) + gate * rows


def _take_rows(table: Tensor, token_ids: Tensor) -> Tensor:
    # index_select, unlike indexing, takes no negative ids.
    rows = table.index_select(0, token_ids.flatten())
    return rows.view(*token_ids.shape, *table.shape[1:])


class _TakeRows(torch.autograd.Function):
    """table[token_ids] with a coalesced sparse gradient."""

    @staticmethod
    def forward(table: Tensor, token_ids: Tensor) -> Tensor:
        return _take_rows(table, token_ids)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        table, token_ids = inputs
        ctx.shape = table.shape
        ctx.save_for_backward(token_ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (token_ids,) = ctx.saved_tensors
        ids, slots = torch.unique(token_ids.flatten().long(), return_inverse=True)
        rows = grad.new_zeros((ids.shape[0], *ctx.shape[1:]))
        rows.index_add_(0, slots, grad.flatten(0, token_ids.dim() - 1))
        sparse = torch.sparse_coo_tensor(
            ids[None], rows, ctx.shape, is_coalesced=True, check_invariants=False
        )
        return sparse, None

"""The compiled backend: C++ on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from resformer_kernels import _extension
from resformer_kernels._launch import (
    copy_note,
    distinct,
    needs_copy,
    refuse_forward_mode,
    unit_stride,
    wants_gradient,
)
from resformer_kernels.mix.autograd import MixValueEmbedding, MixValues, embedding_op, values_op
from resformer_kernels.mix.call import EmbeddingCall, MixCall
from resformer_kernels.mix.ops import EMBEDDING, VALUES

NAME = "native"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(call: MixCall | EmbeddingCall) -> str | None:
    """Why the native kernels cannot serve this call; None when they can."""
    value = call.values[0] if isinstance(call, MixCall) else call.v
    if value.device.type != "cpu":
        return f"it runs on CPU tensors, these are on {value.device}"
    if value.dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16, these are {value.dtype}"
    return _extension.unavailable_reason()


def notes(call: MixCall | EmbeddingCall) -> list[str]:
    """What this backend does to the arguments before the kernel."""
    if isinstance(call, MixCall):
        named = [(f"values[{i}]", value) for i, value in enumerate(call.values)]
    else:
        named = [("v", call.v), ("table", call.table)]
    return [copy_note(name, tensor) for name, tensor in named if needs_copy(tensor)]


def run(call: MixCall | EmbeddingCall) -> Tensor:
    """The mixed value, contiguous, in the values' shape and dtype."""
    return _run_values(call) if isinstance(call, MixCall) else _run_embedding(call)


def _run_values(call: MixCall) -> Tensor:
    leaves: tuple[Tensor | None, ...] = (
        *(unit_stride(x) for x in call.values),
        *call.coefficients,
    )
    if torch.compiler.is_compiling():
        leaves = distinct(leaves)
    else:
        refuse_forward_mode(VALUES, leaves)
    apply = MixValues.apply if wants_gradient(leaves) else values_op
    out: Tensor = apply(call.coefficient_values, *leaves)
    return out


def _run_embedding(call: EmbeddingCall) -> Tensor:
    leaves: tuple[Tensor | None, ...] = (
        unit_stride(call.v),
        unit_stride(call.table),
        call.token_ids,
        call.gate,
    )
    if torch.compiler.is_compiling():
        leaves = distinct(leaves)
    else:
        refuse_forward_mode(EMBEDDING, leaves)
    apply = MixValueEmbedding.apply if wants_gradient(leaves) else embedding_op
    out: Tensor = apply(call.gate_value, call.sparse_grad, *leaves)
    return out

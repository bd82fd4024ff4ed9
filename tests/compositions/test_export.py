"""torch.export of the public functions, and the exported programs' results at other lengths."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from resformer_kernels import (
    mix_value_embedding,
    mix_values,
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels.compat import scaled_dot_product_attention
from resformer_kernels.compat.flash_attn import flash_attn_func

pytestmark = [
    pytest.mark.usefixtures("native"),
    # Raised inside torch while it exports, and while it saves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Exported(nn.Module):
    """A function wrapped as a module for torch.export."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Tensor) -> Any:
        return self.function(*arguments)


def attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor, lam: Tensor) -> Any:
    return value_residual_attention(
        q, k, v, first, lam, 0.3, causal=True, window=(5, 0), return_lse=True,
        return_mixed_value=True,
    )  # fmt: skip


def packed(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Any:
    return value_residual_attention_varlen(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=q.shape[0],
        max_seqlen_k=q.shape[0], causal=True,
    )  # fmt: skip


def sdpa(q: Tensor, k: Tensor, v: Tensor, first: Tensor, lam: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, v_first=first, lambda_v=lam)


def flash(q: Tensor, k: Tensor, v: Tensor, first: Tensor, lam: Tensor) -> Any:
    return flash_attn_func(q, k, v, causal=True, v_first=first, lambda_v=lam)


def mix(v: Tensor, first: Tensor, table: Tensor, ids: Tensor, gate: Tensor) -> Any:
    return mix_value_embedding(mix_values([v, first], [0.5, gate]), table, ids, gate)


T, N = Dim("T", min=2, max=4096), Dim("N", min=3, max=64)


def time_major(t: int) -> tuple[Tensor, ...]:
    return rand(2, t, 4, 8), *(rand(2, t, 2, 8) for _ in range(3)), rand(2, 1)


CASES: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[Tensor, ...]], Any]] = {
    "attention": (attention, time_major, (*[{1: T}] * 4, None)),
    "packed": (
        packed,
        lambda t: (*(rand(t, 2, 8) for _ in range(3)), torch.linspace(0, t, t // 3).int()),
        (*[{0: T}] * 3, {0: N}),
    ),
    "sdpa": (
        sdpa,
        lambda t: (*(rand(2, 4, t, 8) for _ in range(4)), rand(2, 4, t, 1)),
        tuple([{2: T}] * 5),
    ),
    "flash": (flash, time_major, (*[{1: T}] * 4, None)),
    "mix": (
        mix,
        lambda t: (
            *(rand(2, t, 2, 8) for _ in range(2)),
            rand(5, 2, 8),
            torch.arange(2 * t).view(2, t) % 5,
            rand(2, t, 2, 1),
        ),
        ({1: T}, {1: T}, None, {1: T}, {1: T}),
    ),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_exports_with_dynamic_length(name: str, strict: bool) -> None:
    function, make, lengths = CASES[name]
    program = export(Exported(function), make(9), dynamic_shapes=(lengths,), strict=strict)
    for length in (9, 12, 33):
        torch.testing.assert_close(
            program.module()(*make(length)), function(*make(length)), rtol=0, atol=0
        )


def test_an_exported_program_is_saved_and_loaded() -> None:
    function, make, lengths = CASES["attention"]
    program = export(Exported(function), make(9), dynamic_shapes=(lengths,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    torch.testing.assert_close(loaded(*make(33)), function(*make(33)), rtol=0, atol=0)

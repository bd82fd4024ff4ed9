"""The drop-ins under torch.compile: one graph, forward and backward, whatever the length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import config
from torch._dynamo.utils import counters

from resformer_kernels.compat import scaled_dot_product_attention
from resformer_kernels.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

pytestmark = [
    pytest.mark.usefixtures("native"),
    # Raised inside torch while it compiles.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def offsets(length: int) -> Tensor:
    return torch.tensor([0, length - 3, length], dtype=torch.int32)


def sdpa(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    return scaled_dot_product_attention(
        q, k, v, None, 0.0, True, enable_gqa=True, v_first=k, lambda_v=lam
    )


def sdpa_masked(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, mask: Tensor) -> Tensor:
    return scaled_dot_product_attention(
        q, k, v, mask, scale=0.3, enable_gqa=True, v_first=k, lambda_v=lam, lambda_first=0.2
    )


def sdpa_folded(q: Tensor, k: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, k, is_causal=True)


def flash(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    out, lse, _ = flash_attn_func(
        q, k, v, causal=True, window_size=(5, 0), softcap=7.0, return_attn_probs=True,
        v_first=k, lambda_v=lam, lambda_first=0.2,
    )  # fmt: skip
    return out.square().sum() + lse.sum()


def flash_packed(qkv: Tensor, first: Tensor, lam: Tensor) -> Tensor:
    options: dict[str, Any] = {"causal": True, "v_first": first, "lambda_first": lam}
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    out = flash_attn_qkvpacked_func(qkv, **options) * flash_attn_kvpacked_func(q, kv, **options)
    return out.sum()


def flash_varlen(qkv: Tensor, first: Tensor, lam: Tensor, cu: Tensor, longest: int) -> Tensor:
    options: dict[str, Any] = {"causal": True, "v_first": first, "lambda_first": lam}
    q, k, v = qkv.unbind(1)
    lengths = (cu, cu, longest, longest)
    return (
        flash_attn_varlen_func(q, k, v, *lengths, **options)
        * flash_attn_varlen_qkvpacked_func(qkv, cu, longest, **options)
        * flash_attn_varlen_kvpacked_func(q, qkv[:, 1:], *lengths, **options)
    ).sum()


def heads_first(t: int) -> tuple[Any, ...]:
    return rand(2, 4, t, 8), rand(2, 2, t, 8), rand(2, 2, t, 8), rand(2, 1, 1)


CASES: dict[str, tuple[Loss, Callable[[int], tuple[Any, ...]]]] = {
    "sdpa, causal": (sdpa, heads_first),
    "sdpa, masked": (sdpa_masked, lambda t: (*heads_first(t), rand(2, 1, t, t))),
    "sdpa, more keys": (sdpa_folded, lambda t: (rand(2, 3, t - 2, 8), rand(2, 3, t, 8))),
    "sdpa, five axes": (sdpa_folded, lambda t: (rand(2, 2, 3, t, 8), rand(2, 1, 3, t, 8))),
    "flash": (
        flash,
        lambda t: (rand(2, t, 4, 8), rand(2, t, 2, 8), rand(2, t, 2, 8), rand(2, 1)),
    ),
    "flash, stacked": (
        flash_packed,
        lambda t: (rand(2, t, 3, 4, 8), rand(2, t, 4, 8), rand(2, t, 4, 1)),
    ),
    "flash, sequences packed": (
        flash_varlen,
        lambda t: (rand(t, 3, 4, 8), rand(t, 4, 8), rand(t, 4, 1), offsets(t), t),
    ),
}


def gradients(loss: Loss, arguments: tuple[Any, ...]) -> list[Tensor]:
    leaves = [
        x.requires_grad_() for x in arguments if isinstance(x, Tensor) and x.is_floating_point()
    ]
    out = loss(*arguments)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@pytest.mark.parametrize("name", CASES)
def test_one_graph_for_every_length(name: str) -> None:
    loss, make = CASES[name]
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    with config.patch(error_on_recompile=True):
        for length in (9, 17, 33):
            found = gradients(compiled, make(length))
            expected = gradients(loss, make(length))
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_lengths_that_start_fixed_cost_one_recompilation() -> None:
    """With dynamic=None, the default, the first length is compiled as static, later ones not."""
    compiled = torch.compile(sdpa, fullgraph=True, backend="aot_eager")
    for length in (9, 17, 33, 40):
        gradients(compiled, heads_first(length))
    assert counters["stats"]["unique_graphs"] == 2

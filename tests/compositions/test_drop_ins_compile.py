"""The drop-ins under torch.compile: one graph, forward and backward, whatever the length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import config
from torch._dynamo.utils import counters
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from resformer_kernels.compat import flash_attn_3, scaled_dot_product_attention
from resformer_kernels.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
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


def used(length: int) -> Tensor:
    return torch.tensor([length - 4, 3], dtype=torch.int32)


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


def flash_3(q: Tensor, k: Tensor, v: Tensor, lam: Tensor) -> Tensor:
    out, lse = flash_attn_3.flash_attn_func(
        q, k, v, causal=True, window_size=(5, 0), return_attn_probs=True, v_first=k, lambda_v=lam
    )
    return out.square().sum() + lse.sum()


def flash_3_varlen(qkv: Tensor, first: Tensor, cu: Tensor, used: Tensor, longest: int) -> Tensor:
    """As modded-nanogpt calls it, and with rows that are not used."""
    q, k, v = qkv.unbind(1)
    lengths = (cu, cu, longest, longest)
    options: dict[str, Any] = {"causal": True, "softmax_scale": 0.12, "window_size": (3, 0)}
    out = flash_attn_3.flash_attn_varlen_func(q, k, v, *lengths, **options)
    some = flash_attn_3.flash_attn_varlen_func(
        q, k, v, *lengths, used, used, **options, v_first=first
    )
    return (out * some).sum()


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
    "flash 3": (
        flash_3,
        lambda t: (rand(2, t, 4, 8), rand(2, t, 2, 8), rand(2, t, 2, 8), rand(2, 1)),
    ),
    "flash 3, sequences packed": (
        flash_3_varlen,
        lambda t: (rand(t, 3, 4, 8), rand(t, 4, 8), offsets(t), used(t), t),
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


@pytest.mark.parametrize("made", [causal_upper_left, causal_lower_right])
def test_a_named_mask(made: Callable[..., Tensor]) -> None:
    def attend(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, k, mask)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    arguments = (rand(2, 4, 5, 8), rand(2, 4, 9, 8), made(5, 9))
    torch.testing.assert_close(compiled(*arguments), attend(*arguments))


@pytest.mark.parametrize("causal", [False, True])
def test_jagged_tensors(causal: bool) -> None:
    def attend(x: Tensor) -> Tensor:
        q = x.transpose(1, 2)
        return scaled_dot_product_attention(q, q, q, is_causal=causal).transpose(1, 2)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for lengths in ((3, 5), (9, 1, 4)):
        rows = [rand(length, 2, 8) for length in lengths]
        x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
        found, expected = compiled(x), attend(x)
        torch.testing.assert_close(found.values(), expected.values())
        ours, theirs = (torch.autograd.grad(y.values().sum(), x)[0] for y in (found, expected))
        torch.testing.assert_close(ours.values(), theirs.values())


def decode(q: Tensor, pages: list[Tensor], table: Tensor, cu: Tensor, longest: int) -> Tensor:
    """Attend over pages, append packed tokens to them, and a batch of them."""
    k, v = pages
    out: Tensor = flash_attn_varlen_func(
        q, k, v, cu, cu, longest, longest, causal=True, block_table=table
    )
    lengths = cu[1:] - cu[:-1]
    new = flash_attn_3.flash_attn_with_kvcache(
        q, k, v, q[:, :2], q[:, 2:], cache_seqlens=lengths, page_table=table, cu_seqlens_q=cu,
        cu_seqlens_k_new=cu, max_seqlen_q=longest, causal=True, window_size=(4, 0),
    )  # fmt: skip
    batch = q[:2, None]
    last = flash_attn_with_kvcache(
        batch, k, v, batch[:, :, :2], batch[:, :, 2:], cache_seqlens=2 * lengths,
        block_table=table, causal=True,
    )  # fmt: skip
    return out.sum() + new.sum() + last.sum()


def test_caches() -> None:
    compiled = torch.compile(decode, fullgraph=True, dynamic=True, backend="aot_eager")
    table = torch.arange(12, dtype=torch.int32).view(2, 6)
    mine, theirs = ([rand(12, 16, 2, 8), rand(12, 16, 2, 8).sin()] for _ in range(2))
    with config.patch(error_on_recompile=True):
        for length in (9, 17, 33):
            q, cu = rand(length, 4, 8), offsets(length)
            found, expected = (
                compiled(q, mine, table, cu, length),
                decode(q, theirs, table, cu, length),
            )
            torch.testing.assert_close(found, expected)
            assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))

"""The public functions under torch.compile, autocast and checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from resformer_kernels import value_residual_attention, value_residual_attention_varlen

# Raised inside torch while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counter:
    """A compiler backend that counts the graphs it is given and runs them with aot_eager."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs += 1
        return aot_eager(graph, inputs)


def leaves(length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(length)
    shapes = [(2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 6), (2, length, 2, 6)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def gradients(loss: Callable[..., Tensor], wrt: list[Tensor], *rest: Any) -> list[Tensor]:
    value = loss(*wrt, *rest)
    return [value.detach(), *torch.autograd.grad(value, wrt)]


def assert_same(compiled: list[Tensor], eager: list[Tensor]) -> None:
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_compiles_whole_with_dynamic_length(backend: str) -> None:
    def loss(
        q: Tensor, k: Tensor, v: Tensor, v_first: Tensor, lam: Tensor, sinks: Tensor
    ) -> Tensor:
        out, lse, mixed = value_residual_attention(
            q, k, v, v_first, lam, 0.3, causal=True, window=(7, 0), sinks=sinks, scale=0.4,
            softcap=9.0, return_lse=True, return_mixed_value=True, backend=backend,
        )  # fmt: skip
        return out.square().sum() + lse.sum() + mixed.sum()

    counter = Counter()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    extra = [torch.randn(2, 1).requires_grad_(), torch.randn(4).requires_grad_()]
    for length in (9, 17, 33):
        wrt = [*leaves(length), *extra]
        assert_same(gradients(compiled, wrt), gradients(loss, wrt))
        if length == 9:
            first = counter.graphs
    assert counter.graphs == first


def test_an_epilogue_compiles_whole(backend: str) -> None:
    """With dynamic length, and without a compilation for every number that is excluded."""

    def loss(*tensors: Any) -> Tensor:
        *operands, gate, share = tensors
        out: Tensor = value_residual_attention(
            *operands, causal=True, exclusive=share, out_gate=gate.sigmoid(), backend=backend
        )
        return out.square().sum()

    counter = Counter()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for length, share in ((9, 0.3), (17, 0.6), (33, 1.0)):
        wrt = [*leaves(length), torch.randn(2, length, 4, 1).requires_grad_()]
        assert_same(gradients(compiled, wrt, share), gradients(loss, wrt, share))
        if length == 9:
            first = counter.graphs
    assert counter.graphs == first


def test_packed_compiles_whole_with_dynamic_length(backend: str) -> None:
    def loss(
        q: Tensor, k: Tensor, v: Tensor, v_first: Tensor, offsets: Tensor, longest: int
    ) -> Tensor:
        out: Tensor = value_residual_attention_varlen(
            q, k, v, v_first, cu_seqlens_q=offsets, cu_seqlens_k=offsets, max_seqlen_q=longest,
            max_seqlen_k=longest, causal=True, backend=backend,
        )  # fmt: skip
        return out.square().sum()

    counter = Counter()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    for length in (9, 17, 33):
        wrt = [x.detach().flatten(0, 1).requires_grad_() for x in leaves(length)]
        offsets = torch.tensor([0, length, 2 * length - 2], dtype=torch.int32)
        assert_same(
            gradients(compiled, wrt, offsets, length), gradients(loss, wrt, offsets, length)
        )
        if length == 9:
            first = counter.graphs
    assert counter.graphs == first


def test_a_float_coefficient_does_not_recompile(native: str) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, v_first: Tensor, lam: float) -> Tensor:
        out: Tensor = value_residual_attention(q, k, v, v_first, lam, 1 - lam, backend=native)
        return out.square().sum()

    counter = Counter()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    wrt = leaves(9)
    graphs = []
    for lam in (0.25, 0.5, 0.75, 0.9):
        assert_same(gradients(compiled, wrt, lam), gradients(loss, wrt, lam))
        graphs.append(counter.graphs)
    assert graphs[1:] == graphs[1:2] * 3


@pytest.mark.slow
def test_compiles_with_inductor(native: str) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, v_first: Tensor) -> Tensor:
        out: Tensor = value_residual_attention(q * 2, k, v, v_first, causal=True, backend=native)
        return (out * 3).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    wrt = leaves(9)
    assert_same(gradients(compiled, wrt), gradients(loss, wrt))


def test_the_same_tensor_twice_compiles(native: str) -> None:
    def loss(x: Tensor) -> Tensor:
        out: Tensor = value_residual_attention(x, x, x, x, causal=True, backend=native)
        return out.square().sum()

    x = torch.randn(1, 6, 2, 8, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(gradients(compiled, [x]), gradients(loss, [x]))


def test_the_library_may_load_while_compiling() -> None:
    """A fresh process whose first native call is a compiled one."""
    import subprocess
    import sys

    program = """
import torch
from resformer_kernels import value_residual_attention
from resformer_kernels._core import extension
assert extension._reason is extension._NOT_TRIED
compiled = torch.compile(value_residual_attention, fullgraph=True, backend="aot_eager")
q = torch.randn(1, 5, 2, 8)
assert compiled(q, q, q).shape == q.shape
assert extension._reason is not extension._NOT_TRIED
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_four_and_nothing_else(backend: str, dtype: torch.dtype) -> None:
    wrt = leaves(9)
    lam = torch.randn(2, 1).requires_grad_()
    sinks, bias = torch.randn(4), torch.randn(9, 9)
    arguments: list[Any] = [*wrt, lam, 0.5]
    options: dict[str, Any] = {"sinks": sinks, "attn_bias": bias, "backend": backend}
    with torch.autocast("cpu", dtype=dtype):
        out = value_residual_attention(*arguments, **options)
    assert out.dtype == dtype
    arguments[:4] = [x.to(dtype) for x in wrt]
    expected = value_residual_attention(*arguments, **options)
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.float().sum(), [*wrt, lam])
    assert all(g.dtype == torch.float32 for g in grads)


def test_autocast_leaves_float64_alone() -> None:
    wrt = leaves(9, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = value_residual_attention(*wrt)
    assert torch.equal(out, value_residual_attention(*wrt))


def test_non_reentrant_checkpointing(backend: str) -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor, v_first: Tensor, lam: Tensor) -> Tensor:
        out: Tensor = value_residual_attention(q, k, v, v_first, lam, backend=backend)
        return out.square().sum()

    def saved(*tensors: Tensor) -> Tensor:
        result: Tensor = checkpoint(loss, *tensors, use_reentrant=False)
        return result

    wrt = [*leaves(9), torch.randn(2, 1).requires_grad_()]
    for a, b in zip(gradients(saved, wrt), gradients(loss, wrt), strict=True):
        assert torch.equal(a, b)

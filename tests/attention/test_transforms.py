"""What attention says under double backward and torch.func's transforms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from resformer_kernels import value_residual_attention


def qkv() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v, v_first = (torch.randn(2, 9, heads, 16) for heads in (4, 2, 2, 2))
    return q, k, v, v_first


def test_double_backward_says_that_it_is_not_there(kernels: str) -> None:
    leaves = [x.requires_grad_() for x in qkv()]
    out = value_residual_attention(*leaves, backend=kernels)
    (dq,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        dq.sum().backward()


def test_vmap_says_that_it_is_not_there(backend: str) -> None:
    q, k, v, _ = qkv()
    stacked = torch.stack([q, q])

    def loss(one: Tensor) -> Tensor:
        out: Tensor = value_residual_attention(one, k, v, backend=backend)
        return out.sum()

    with pytest.raises(RuntimeError, match=r"does not support torch\.func\.vmap"):
        torch.func.vmap(loss)(stacked)


def test_vmap_over_a_gradient_says_so_too(kernels: str) -> None:
    q, k, v, _ = qkv()

    def loss(one: Tensor) -> Tensor:
        out: Tensor = value_residual_attention(one, k, v, backend=kernels)
        return out.sum()

    with pytest.raises(RuntimeError, match=r"does not support torch\.func\.vmap"):
        torch.func.vmap(torch.func.grad(loss))(torch.stack([q, q]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch loads its own decompositions
def test_forward_mode_says_that_it_is_not_there(kernels: str) -> None:
    q, k, v, _ = qkv()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, q)
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            value_residual_attention(dual, k, v, backend=kernels)


def test_func_grad(kernels: str) -> None:
    q, k, v, v_first = qkv()

    def loss(one: Tensor) -> Tensor:
        out: Tensor = value_residual_attention(one, k, v, v_first, backend=kernels)
        return out.square().sum()

    leaf = q.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    assert torch.equal(torch.func.grad(loss)(q), leaf.grad)

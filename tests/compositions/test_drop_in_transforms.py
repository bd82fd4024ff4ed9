"""Errors of the drop-ins under unsupported transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels.compat import scaled_dot_product_attention
from resformer_kernels.compat.flash_attn import flash_attn_func, flash_attn_qkvpacked_func

pytestmark = pytest.mark.usefixtures("native")

Attend = Callable[..., Any]
both = pytest.mark.parametrize("attend", [scaled_dot_product_attention, flash_attn_func])


def qkv(*axes: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(*axes, 2, 4, 4, 8) for _ in range(3))
    return q, k, v


@both
def test_vmap_says_that_it_is_not_there(attend: Attend) -> None:
    with pytest.raises(RuntimeError, match=r"does not support torch\.func\.vmap"):
        torch.func.vmap(attend)(*qkv(3))


def test_vmap_of_stacked_tensors_says_so_too() -> None:
    with pytest.raises(RuntimeError, match=r"does not support torch\.func\.vmap"):
        torch.func.vmap(flash_attn_qkvpacked_func)(torch.randn(2, 1, 4, 3, 2, 8))


@both
def test_double_backward_says_that_it_is_not_there(attend: Attend) -> None:
    leaves = [x.requires_grad_() for x in qkv()]
    (dq,) = torch.autograd.grad(attend(*leaves).sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not support double backward"):
        dq.sum().backward()


@both
def test_func_grad(attend: Attend) -> None:
    q, k, v = qkv()

    def loss(one: Tensor) -> Tensor:
        out: Tensor = attend(one, k, v)
        return out.square().sum()

    leaf = q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(q), expected)

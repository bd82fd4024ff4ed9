"""Results of more than 16 MiB, which are written past the caches where an address allows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resformer_kernels import mix_values
from resformer_kernels.testing import poisoned


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(
    ("dtype", "dim"), [(torch.float32, 96), (torch.float32, 99), (torch.bfloat16, 99)], ids=str
)
def test_every_element_is_written(
    dtype: torch.dtype, dim: int, by_head: bool, cpu_path: str
) -> None:
    assert cpu_path
    # With coefficients by head, heads are rows of their own, which start anywhere.
    shape, length = (4, 1) if by_head else (1, 1), 11_100
    values = [torch.randn(1, length, 4, dim).to(dtype) for _ in range(3)]
    coefficients = [torch.randn(shape) for _ in values]
    grad = torch.randn(1, length, 4, dim).to(dtype)
    leaves: list[Tensor] = [x.requires_grad_() for x in (*values, *coefficients)]
    with poisoned():
        out = mix_values(values, coefficients, backend="native")
        found = torch.autograd.grad(out, leaves, grad)
    assert 3 * out.nbytes > 2**24
    products = torch.stack(
        [
            c.detach().double() * v.detach().double()
            for c, v in zip(coefficients, values, strict=True)
        ]
    )
    # Three roundings to float32: of the first product and of two sums; that to 16 bits is coarser.
    budget = 3 / 2 * torch.finfo(dtype).eps * products.abs().sum(0)
    assert bool(((out.detach().double() - products.sum(0)).abs() <= budget).all())
    for c, dv in zip(coefficients, found[:3], strict=True):
        assert torch.equal(dv, (c * grad.float()).to(dtype))
    for v, dc in zip(values, found[3:], strict=True):
        sums = (v.double() * grad.double()).sum((0, 1, 3) if by_head else (0, 1, 2, 3))
        torch.testing.assert_close(dc.flatten().double(), sums.flatten(), rtol=1e-4, atol=1e-2)

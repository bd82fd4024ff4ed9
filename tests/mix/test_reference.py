"""The reference against the formulas written out, and its gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from resformer_kernels import mix_value_embedding, mix_values

SHAPES = [(2, 3, 2, 4), (5, 2, 3)]


def wide(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_the_sum_written_out(shape: tuple[int, ...]) -> None:
    a, b, c = (torch.randn(shape) for _ in range(3))
    gate, head = torch.randn(*shape[:-1], 1), torch.randn(shape[-2], 1)
    out = mix_values([a, b, c], [0.25, gate, head], backend="reference")
    torch.testing.assert_close(out, 0.25 * a + gate * b + head * c)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_embedding_is_the_gather_written_out(shape: tuple[int, ...]) -> None:
    v, table, gate = torch.randn(shape), torch.randn(7, *shape[-2:]), torch.randn(*shape[:-1], 1)
    ids = torch.randint(7, shape[:-2])
    out = mix_value_embedding(v, table, ids, gate, backend="reference")
    torch.testing.assert_close(out, v + gate * table[ids])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_values(shape: tuple[int, ...]) -> None:
    leaves = (wide(*shape), wide(*shape), wide(shape[-2], 1), wide(*shape[:-2], 1, 1))

    def mix(a: Tensor, b: Tensor, head: Tensor, token: Tensor) -> Tensor:
        return mix_values([a, b, a], [head, token, 0.5], backend="reference")

    assert gradcheck(mix, leaves)
    assert gradgradcheck(mix, leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_an_embedding(shape: tuple[int, ...]) -> None:
    ids = torch.randint(4, shape[:-2])

    def mix(v: Tensor, table: Tensor, gate: Tensor) -> Tensor:
        return mix_value_embedding(v, table, ids, gate, backend="reference")

    leaves = (wide(*shape), wide(4, *shape[-2:]), wide(*shape[:-1], 1))
    assert gradcheck(mix, leaves)
    assert gradgradcheck(mix, leaves)


def test_float32_is_mixed_wide_and_rounded_once() -> None:
    values = [torch.randn(2, 9, 2, 8).bfloat16() for _ in range(8)]
    coefficients = [torch.rand(()) for _ in values]
    out = mix_values(values, coefficients, backend="reference")
    exact = torch.zeros_like(out, dtype=torch.float64)
    for c, v in zip(coefficients, values, strict=True):
        exact += c.double() * v.double()
    assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


def test_float64_goes_to_the_reference() -> None:
    v = torch.randn(1, 2, 1, 4, dtype=torch.float64)
    assert mix_values([v], [1.0]).dtype is torch.float64
    with pytest.raises(RuntimeError, match="serves float32, bfloat16 and float16"):
        mix_values([v], [1.0], backend="native")

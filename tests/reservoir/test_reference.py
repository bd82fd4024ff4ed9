"""The definition of correct: gradients in float64, every form of a weight, reductions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import RingWeight, reservoir_scan
from tests.reservoir.cases import KINDS, dense_of, matrix, wide

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")


def leaves(units: int, inputs: int = 2) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.requires_grad_()

    leak = (torch.rand(units, generator=generator, dtype=torch.float64) * 0.8).requires_grad_()
    return normal(2, 5, inputs), normal(units, inputs), leak, normal(units), normal(2, units)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    weight = wide(matrix(kind, 6, 0.8, torch.Generator().manual_seed(1)))
    values = weight.values if isinstance(weight, RingWeight) else weight
    sparse = isinstance(values, Tensor) and values.layout is torch.sparse_csr
    free = (values.values() if sparse else values).detach().clone().requires_grad_()

    def scan(free: Tensor, u: Tensor, w_in: Tensor, a: Tensor, b: Tensor, h: Tensor) -> Any:
        given: Any = free
        if isinstance(weight, RingWeight):
            given = weight._replace(values=free)
        elif sparse:
            given = torch.sparse_csr_tensor(
                weight.crow_indices(),
                weight.col_indices(),
                free,
                weight.shape,
                check_invariants=True,
            )
        return reservoir_scan(u, given, input_weight=w_in, leak=a, bias=b, initial_state=h)

    assert torch.autograd.gradcheck(scan, (free, *leaves(6)))


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_gradcheck_of_activations(activation: str) -> None:
    u, _, a, b, h = leaves(4, 4)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)

    def scan(*x: Tensor) -> Any:
        return reservoir_scan(
            x[0], x[1], leak=x[2], bias=x[3], initial_state=x[4], activation=activation
        )

    assert torch.autograd.gradcheck(scan, (u, weight, a, b, h))


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_is_its_dense_matrix(kind: str) -> None:
    weight = wide(matrix(kind, 9, 0.8, torch.Generator().manual_seed(2)))
    u = torch.randn(3, 7, 9, dtype=torch.float64)
    got = reservoir_scan(u, weight, leak=0.4)
    expected = reservoir_scan(u, dense_of(weight), leak=0.4)
    torch.testing.assert_close(got, expected)


def test_the_equation() -> None:
    u, w_in, a, b, h = (x.detach() for x in leaves(5))
    weight = torch.randn(5, 5, dtype=torch.float64)
    states, last = reservoir_scan(u, weight, input_weight=w_in, leak=a, bias=b, initial_state=h)
    for t in range(u.shape[1]):
        h = (1 - a) * h + a * torch.tanh(h @ weight.T + u[:, t] @ w_in.T + b)
        torch.testing.assert_close(states[:, t], h)
    torch.testing.assert_close(last, h)


def test_inputs_are_widened() -> None:
    u = torch.randn(1, 4, 3).bfloat16()
    states, last = reservoir_scan(u, torch.eye(3), backend="reference")
    assert states.dtype is last.dtype is torch.float32
    torch.testing.assert_close(states, reservoir_scan(u.float(), torch.eye(3))[0])

"""The definition of correct: gradients in float64, every form of a weight, reductions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import RingWeight, reservoir_scan
from resformer_kernels.reservoir.record import ACTIVATIONS
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


@pytest.mark.parametrize("shape", [(4, 4), (2, 2, 2)])
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_gradcheck_of_activations(activation: str, shape: tuple[int, ...]) -> None:
    u, _, a, b, h = leaves(4, 4)
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)

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


def test_activations_are_those_of_reservoirpy() -> None:
    z = torch.tensor([-60.0, -21.0, -1.0, 0.0, 0.5, 19.0, 60.0, 700.0], dtype=torch.float64)
    expected = {
        "tanh": [math.tanh(x) for x in z.tolist()],
        "relu": [max(x, 0.0) for x in z.tolist()],
        "identity": z.tolist(),
        "sigmoid": [1 / (1 + math.exp(-x)) for x in z.tolist()],
        "softplus": [math.log1p(math.exp(x)) for x in z.tolist()],
        "softmax": [math.exp(x - 700.0) / (1 + math.exp(60.0 - 700.0)) for x in z.tolist()],
    }
    assert tuple(expected) == ACTIVATIONS
    for name, values in expected.items():
        states, _ = reservoir_scan(z.view(1, 1, 8), torch.zeros(8, 8).double(), activation=name)
        assert states.flatten().tolist() == pytest.approx(values, rel=1e-14)
        halves, _ = reservoir_scan(z.view(1, 1, 8), torch.zeros(2, 4, 4).double(), activation=name)
        if name == "softmax":
            # Each group is a reservoir of its own.
            torch.testing.assert_close(halves.unflatten(-1, (2, 4)).sum(-1), z.new_ones(1, 1, 2))
        else:
            assert torch.equal(halves, states)


def test_inputs_are_widened() -> None:
    u = torch.randn(1, 4, 3).bfloat16()
    states, last = reservoir_scan(u, torch.eye(3), backend="reference")
    assert states.dtype is last.dtype is torch.float32
    torch.testing.assert_close(states, reservoir_scan(u.float(), torch.eye(3))[0])

"""The ops under PyTorch's machinery: opcheck, compile, autocast, checkpointing, transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import linear_scan
from tests.machinery import (  # noqa: F401
    check_compiles_whole,
    same,
    test_checkpointing,
    test_forward_mode_says_no,
    test_gradients_are_not_differentiable_again,
    test_vmap_says_no,
)

pytestmark = [
    # Raised inside torch while it compiles and while it loads its forward-mode rules.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def made(length: int = 5, *, constant: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    shape = (3,) if constant else (2, length, 3)
    gates = torch.rand(shape, requires_grad=True)
    return gates, torch.randn(2, length, 3, requires_grad=True), torch.randn(2, 3).requires_grad_()


@pytest.fixture
def make() -> Callable[..., Any]:
    return made


@pytest.fixture
def function(kernels: str) -> Callable[..., Any]:
    """The scan on one backend."""
    return functools.partial(linear_scan, backend=kernels)


def test_opcheck(kernels: str) -> None:
    ops = torch.ops.resformer if kernels == "native" else torch.ops.resformer_triton
    gates, x, state = (leaf.detach() for leaf in made())
    cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32)
    calls = [
        (ops.linear_scan_forward, (gates, x, state, False, None)),
        (ops.linear_scan_forward, (gates[0, 0], x.bfloat16(), None, True, None)),
        (ops.linear_scan_forward, (gates[0], x[0], state, True, cu_seqlens)),
        (
            ops.linear_scan_forward,
            (gates.to(torch.complex64), x.to(torch.complex64), None, False, None),
        ),
        (ops.linear_scan_backward, (x, state, gates, x, state, False, None, 7)),
        (ops.linear_scan_backward, (None, state, gates[0, 0], x, None, True, None, 3)),
        (ops.linear_scan_backward, (x[0], None, gates[0], x[0], state, False, cu_seqlens, 4)),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("constant", [False, True])
def test_compiles_whole_with_dynamic_length(constant: bool, function: Any) -> None:
    check_compiles_whole(function, functools.partial(made, constant=constant), (4, 6, 7))


def test_compiles_where_one_output_is_used(kernels: str) -> None:
    torch._dynamo.reset()

    def last(*inputs: Tensor) -> Tensor:
        return linear_scan(*inputs, backend=kernels)[1]

    compiled = torch.compile(last, fullgraph=True, backend="aot_eager")
    inputs = made()
    got, expected = (
        torch.autograd.grad(function(*inputs).square().sum(), inputs)
        for function in (compiled, last)
    )
    same(list(got), list(expected))


def test_autocast_leaves_it_alone(backend: str) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, final = linear_scan(*made(), backend=backend)
    assert states.dtype is final.dtype is torch.float32


def test_conjugate_views_are_read_as_what_they_stand_for(kernels: str) -> None:
    gates, x = (torch.randn(1, 4, 3, dtype=torch.complex64) for _ in range(2))
    got = linear_scan(gates.conj(), x, backend=kernels)
    same(list(got), list(linear_scan(gates.conj().resolve_conj(), x, backend="reference")))


@pytest.mark.usefixtures("native")
def test_the_op_itself_checks_its_arguments() -> None:
    gates, x, state = (leaf.detach() for leaf in made())
    forward, backward = (
        torch.ops.resformer.linear_scan_forward,
        torch.ops.resformer.linear_scan_backward,
    )
    one = torch.tensor([0, 5], dtype=torch.int32)
    wrong: list[Callable[[], Any]] = [
        lambda: forward(gates, x[0], None, False, None),
        lambda: forward(gates, x, None, False, one),
        lambda: forward(gates[:, :3], x, None, False, None),
        lambda: forward(gates[0, 0, :2], x, None, False, None),
        lambda: forward(gates[0], x, None, False, None),
        lambda: forward(gates.half(), x, None, False, None),
        lambda: forward(gates.double(), x.double(), None, False, None),
        lambda: forward(gates, x.transpose(1, 2).contiguous().transpose(1, 2), None, False, None),
        lambda: forward(gates, x, state[:1], False, None),
        lambda: forward(gates, x, state.half(), False, None),
        lambda: forward(gates[0], x[0], None, False, one + 1),
        lambda: forward(gates[0], x[0], None, False, one.long()),
        lambda: forward(gates[0], x[0], None, False, 2 * one),
        lambda: backward(x[:, :2], None, gates, x, None, False, None, 1),
        lambda: backward(x.half(), None, gates, x, None, False, None, 1),
        lambda: backward(x, state[:1], gates, x, None, False, None, 1),
        lambda: backward(x, None, gates, x, None, False, None, 4),
    ]
    for call in wrong:
        with pytest.raises(RuntimeError):
            call()

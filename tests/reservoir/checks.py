"""Checks of the reservoir that the tests of several backends share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import RingWeight, reservoir_scan
from resformer_kernels.reservoir.record import ACTIVATIONS, AdjointCall, ReservoirCall

BY_KERNELS = tuple(name for name in ACTIVATIONS if name != "softmax")
"""Activations that every backend serves."""


def check_not_finite(u: Tensor, weight: Tensor, backend: str, **options: Any) -> None:
    """NaN and inf among the inputs spread as they do in the reference."""
    expected, _ = reservoir_scan(u, weight, leak=0.5, backend="reference", **options)
    got, _ = reservoir_scan(u, weight, leak=0.5, backend=backend, **options)
    assert torch.equal(got.isfinite(), expected.isfinite())
    torch.testing.assert_close(got.nan_to_num(), expected.nan_to_num(), rtol=1e-4, atol=1e-5)


def check_gradients(leaves: list[Tensor], leak: float, mode: str, backend: str) -> None:
    """Gradients of inputs, weight and input weight are within 1e-5 of float64's."""
    found = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        x = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        states, last = reservoir_scan(
            x[0], x[1], input_weight=x[2], leak=leak, mode=mode, backend=name
        )
        found.append(torch.autograd.grad(states.square().sum() + last.sum(), x))
    for got, true in zip(*found, strict=True):
        assert float((got.double() - true).norm()) <= 1e-5 * float(true.norm())


def ops_of(namespace: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The forward and the adjoint op on arguments that are right but for those given by name."""
    ops = getattr(torch.ops, namespace)
    u, w, leak = torch.randn(2, 5, 4), torch.randn(4, 4), torch.tensor(0.5)

    def forward(**changed: Any) -> Any:
        call = ReservoirCall(u, w, None, None, None, leak, None, None, 0, 1, 0.0, None)
        return ops.reservoir_scan_forward(*call._replace(**changed))

    def adjoint(**changed: Any) -> Any:
        call = AdjointCall(u, u, w, None, None, leak, 1, torch.zeros((), dtype=torch.float64), None)
        return ops.reservoir_scan_adjoint(*call._replace(**changed))

    forward()
    adjoint()
    return forward, adjoint


def check_refusals(
    namespace: str, forward_only: list[dict[str, Any]], adjoint_only: list[dict[str, Any]]
) -> None:
    """The ops raise RuntimeError for what every one of their kernels refuses, and for those."""
    forward, adjoint = ops_of(namespace)
    u, w = torch.randn(2, 5, 4), torch.randn(4, 4)
    wrong: list[dict[str, Any]] = [
        {"inputs": u[..., :3]},
        {"inputs": u[0]},
        {"inputs": u.double()},
        {"inputs": u.mT.contiguous().mT},
        {"weight": w[:3]},
        {"weight": w.half()},
        {"input_weight": torch.ones(3, 4)},
        {"leak": torch.ones(3)},
        {"bias": torch.ones(5)},
        {"initial_state": torch.ones(1, 4)},
        {"activation": 5},
    ]
    for op, changes in ((forward, wrong + forward_only), (adjoint, adjoint_only)):
        for changed in changes:
            with pytest.raises(RuntimeError):
                op(**changed)


def check_compiles_whole(backend: str, **options: Any) -> None:
    """A compiled graph returns the info, and what the call returns."""
    torch._dynamo.reset()

    def whole(u: Tensor, values: Tensor) -> Any:
        weight = RingWeight(values)
        return reservoir_scan(u, weight, return_info=True, backend=backend, **options)

    u, values = torch.randn(2, 5, 4), torch.rand(4)
    got, _, info = torch.compile(whole, fullgraph=True, backend="aot_eager")(u, values)
    expected, _, told = whole(u, values)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(tuple(info), tuple(told))


def check_op(namespace: str, given: tuple[Any, ...], targets: Tensor | None) -> None:
    """opcheck of the ops that take a ReservoirCall."""
    ops = getattr(torch.ops, namespace)
    torch.library.opcheck(ops.reservoir_scan_forward.default, given)
    states, final, _ = ops.reservoir_scan_forward(*given)
    for grad_states, mask in ((states, 0b111111), (None, 0b000010)):
        torch.library.opcheck(
            ops.reservoir_scan_backward.default, (grad_states, final, *given, states, mask)
        )
    for reduce, y in (("mean", None), ("last", None), ("gram", targets)):
        torch.library.opcheck(ops.reservoir_scan_reduced.default, (*given, reduce, y))
    grad, tolerance = torch.randn(2, 3, 4), torch.tensor(1e-6, dtype=torch.float64)
    weight, leak = torch.randn(4, 4), torch.tensor(0.5)
    torch.library.opcheck(
        ops.reservoir_scan_adjoint.default,
        (grad, grad, weight, None, None, leak, 1, tolerance, None),
    )

"""Differentiable calls compared with float64: mixes, scans and reservoirs are verified by it.

    error <= 2 * error(reference in the same precision) + u(dtype) * S

in Frobenius norms, where S is the norm of the terms that each tensor sums up (see `budgets`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from resformer_kernels.testing.budgets import Comparison
from resformer_kernels.testing.poison import poisoned

Arguments: TypeAlias = tuple[Sequence[Any], Mapping[str, Any]]
"""Positional and named arguments of a call."""


@dataclass(frozen=True)
class Problem:
    """A call of an op, and gradients of its outputs."""

    leaves: Sequence[Tensor]
    """The tensors to differentiate."""
    arguments: Callable[[Sequence[Tensor]], Arguments]
    """The op's arguments, made from leaves, of any precision."""
    grads: Sequence[Tensor]
    """Gradients of the first outputs; any other output is left alone."""
    names: Sequence[str]
    """Names of those outputs, then of the gradients of `leaves`."""
    terms: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]
    """Leaves and grads, from float64 ones, whose outcome has the norms S. Expanded leaves, for
    example, have the terms of a reduced gradient as their gradient."""


def compare_problem(
    function: Callable[..., Any], problem: Problem, backend: str
) -> list[Comparison]:
    """Every output and gradient of `function` against float64."""
    leaves, grads = problem.leaves, problem.grads
    with poisoned():
        got = _outcome(function, problem, leaves, grads, backend)
    near = _outcome(function, problem, leaves, grads, "reference")
    wide = [_wide(x) for x in leaves], [_wide(x) for x in grads]
    exact = _outcome(function, problem, *wide, "reference")
    terms = _outcome(function, problem, *problem.terms(*wide), "reference")
    unit = torch.finfo(grads[0].dtype).eps / 2
    found = []
    for name, mine, same, true, parts in zip(problem.names, got, near, exact, terms, strict=True):
        budget = 2 * _distance(same, true) + unit * float(parts.norm())
        found.append(Comparison(name, _distance(mine, true), budget, float(true.norm())))
    return found


def _outcome(
    function: Callable[..., Any],
    problem: Problem,
    leaves: Sequence[Tensor],
    grads: Sequence[Tensor],
    backend: str,
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    positional, named = problem.arguments(leaves)
    found = function(*positional, **named, backend=backend)
    outputs = (found if isinstance(found, tuple) else (found,))[: len(grads)]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, grads)]


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _distance(got: Tensor, true: Tensor) -> float:
    error = float((got.to(true.dtype) - true).norm())
    return error if error == error else float("inf")

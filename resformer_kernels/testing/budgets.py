"""Error budgets: float64 decides, the reference in the same precision sets the scale.

    error <= 2 * error(reference in the same precision) + u(dtype) * S

in Frobenius norms, with u the unit roundoff of the inputs' dtype. A gradient that is a cancelling
sum cannot be more exact than its terms allow, so S is the norm of the terms before their reduction
(coefficients, sinks), of the gradient with the softmax normaliser frozen (q, k, additive bias), and
else the norm of the float64 tensor itself. Those norms depend on the luck of the output gradients'
signs, so S is at least its root mean square over random signs. For
gradients the error of the reference is the larger of two: by autograd, and from out and the LSE
alone, which is all that a kernel of linear memory keeps. (By autograd a row with one key cancels
exactly, and a budget of zero would say nothing about precision.)

The reference's error is itself luck: of a tensor with one element it is often near zero. Where a
first look finds an error too large, the reference is run again with its channels in other orders
and its queries, values and output gradients a few per cent larger or smaller, which changes little
but the rounding, and the largest of its errors counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.select import prepare
from resformer_kernels.attention import reference
from resformer_kernels.attention.record import LEAVES
from resformer_kernels.testing.epilogue_terms import plain_call
from resformer_kernels.testing.inputs import AttentionCase, Inputs, attention_inputs
from resformer_kernels.testing.poison import poisoned

_DRAWS = 3
_ORDERS = 8
_GRADIENTS = LEAVES


@dataclass(frozen=True)
class Comparison:
    """One tensor of a call held against float64. Norms are Frobenius norms."""

    name: str
    """An output ("out", "lse", "mixed") or a gradient ("dq", "dlambda_v", ...)."""
    error: float
    budget: float
    norm: float
    """Norm of the float64 tensor."""

    @property
    def ok(self) -> bool:
        """Whether the error is within the budget."""
        return self.error <= self.budget

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "TOO LARGE"
        return (
            f"{self.name}: error {self.error:.3e}, budget {self.budget:.3e}, "
            f"norm {self.norm:.3e}: {verdict}"
        )


def compare_case(case: AttentionCase, *, backend: str, device: str = "cpu") -> list[Comparison]:
    """`compare` on the inputs that `case` describes."""
    inputs = attention_inputs(case, device)
    return compare(inputs.function, inputs.tensors, inputs.options, inputs.grads, backend=backend)


def compare(
    function: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    grads: tuple[Tensor, ...],
    *,
    backend: str,
) -> list[Comparison]:
    """Forward and backward of `function(**tensors, **options, backend=backend)` against float64.

    Args:
        function: `value_residual_attention` or `value_residual_attention_varlen`.
        tensors: its tensor arguments by name. Every floating one is differentiated.
        options: its other arguments by name, backend apart.
        grads: gradients for the outputs, in their order and of their shapes.
        backend: whose errors are measured. Its uninitialised memory is poisoned with NaN.

    Returns:
        A `Comparison` for every output and every gradient. NaN and infinities must lie where
        float64 has them, else the error is infinite.
    """
    inputs = Inputs(function, dict(tensors), dict(options), grads)
    with poisoned():
        got = _outcome(inputs, backend)
    wide = _wide(inputs)
    exact = _outcome(wide, "reference")
    terms = _summed_terms(wide, exact)
    near = _reference_errors(inputs, exact)
    unit = torch.finfo(tensors["q"].dtype).eps / 2
    found = compared(got, exact, near, unit, terms)
    if all(item.ok for item in found):
        return found
    luck = torch.Generator().manual_seed(0)
    for _ in range(_ORDERS):
        other = _redrawn(inputs, luck)
        errors = _reference_errors(other, _outcome(_wide(other), "reference"))
        near = {name: max(error, errors[name]) for name, error in near.items()}
    return compared(got, exact, near, unit, terms)


def compared(
    got: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    near: Mapping[str, float],
    unit: float,
    terms: Mapping[str, float],
) -> list[Comparison]:
    """Tensors against float64 ones; `near` are the reference's errors, `terms` S by name where it
    is not the norm."""
    found = []
    for name, true in exact.items():
        size = norm(true)
        budget = 2 * near[name] + unit * terms.get(name, size)
        found.append(Comparison(name, misfit(got[name], true), budget, size))
    return found


def _outcome(inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """Outputs by name, and gradients by argument's name after a "d"."""
    tensors = inputs.tensors
    leaves = {
        name: tensors[name].detach().requires_grad_()
        for name in _GRADIENTS
        if name in tensors and tensors[name].is_floating_point()
    }
    outputs = inputs.function(**{**tensors, **leaves}, **inputs.options, backend=backend)
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), inputs.grads)
    return {
        **{n: x.detach() for n, x in zip(_outputs(inputs.options), outputs, strict=True)},
        **{f"d{name}": x for name, x in zip(leaves, gradients, strict=True)},
    }


def _outputs(options: Mapping[str, Any]) -> list[str]:
    names = {"return_lse": "lse", "return_mixed_value": "mixed"}
    return ["out", *(name for option, name in names.items() if options.get(option))]


def _reference_errors(inputs: Inputs, exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Errors of the reference in the tensors' own precision."""
    near = _outcome(inputs, "reference")
    by_lse = _outcome(replace(inputs, function=_by_lse(inputs.function)), "reference")
    errors = {name: misfit(near[name], true) for name, true in exact.items()}
    for name in errors.keys() - _outputs(inputs.options):
        errors[name] = max(errors[name], misfit(by_lse[name], exact[name]))
    return errors


def _redrawn(inputs: Inputs, luck: torch.Generator) -> Inputs:
    """The same problem up to rounding: other orders of channels, other magnitudes."""
    value = _value(inputs.tensors)
    keys = torch.randperm(inputs.tensors["q"].shape[-1], generator=luck).to(value.device)
    values = torch.randperm(value.shape[-1], generator=luck).to(value.device)
    # Near 1, so that errors keep their size. Scores stay, the output is linear in the values, and
    # the gradients are in those of the output.
    factor, of_keys, of_values = (
        1 + (float(torch.rand((), generator=luck)) - 0.5) / 16 for _ in range(3)
    )
    factors = {"q": of_keys, "k": 1 / of_keys, "v": of_values, "v_first": of_values}

    def move(name: str, x: Tensor) -> Tensor:
        if name in factors:
            x = x * factors[name]
        if name in ("q", "k"):
            return x[..., keys]
        by_channel = name in (
            "v",
            "v_first",
            "out",
            "mixed",
            "lambda_v",
            "lambda_first",
            "out_gate",
        )
        return x[..., values] if by_channel and x.dim() and x.shape[-1] == len(values) else x

    named = zip(_outputs(inputs.options), inputs.grads, strict=True)
    return replace(
        inputs,
        tensors={name: move(name, x) for name, x in inputs.tensors.items()},
        grads=tuple(move(name, g) * factor for name, g in named),
    )


def _value(tensors: Mapping[str, Tensor]) -> Tensor:
    return next(tensors[name] for name in ("v", "v_first") if name in tensors)


def _by_lse(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """`function` on the reference that differentiates from out and the LSE."""

    def run(**arguments: Any) -> tuple[Tensor, ...]:
        request = prepare(function, **arguments)
        found = reference.run_with(reference.attend_by_lse, request.call)
        return tuple(x for x in found if x is not None)

    return run


def _wide(inputs: Inputs) -> Inputs:
    def wide(x: Tensor) -> Tensor:
        return x.detach().double() if x.is_floating_point() else x

    tensors = {name: wide(x) for name, x in inputs.tensors.items()}
    return replace(inputs, tensors=tensors, grads=tuple(map(wide, inputs.grads)))


def _summed_terms(wide: Inputs, exact: Mapping[str, Tensor]) -> dict[str, float]:
    """S of every gradient, from float64 inputs, and of what an epilogue cancels."""
    magnitudes: tuple[Tensor, ...] | None = None
    epilogue: dict[str, float] = {}
    if not prepare(wide.function, **wide.tensors, **wide.options).call.plain:
        named = dict(zip(_outputs(wide.options), wide.grads, strict=True))
        wide, magnitudes, epilogue = plain_call(wide, named)
    # A coefficient in V's full shape has the terms of the reduced one's gradient as its gradient.
    value = _value(wide.tensors)
    unreduced = dict(wide.tensors)
    for name in ("lambda_v", "lambda_first"):
        if f"d{name}" in exact:
            unreduced[name] = unreduced[name].expand(value.shape).contiguous()
    options = {**wide.options, "return_lse": True}
    with torch.no_grad():
        out, lse, *_ = wide.function(**wide.tensors, **options, backend="reference")
    named = dict(zip(_outputs(wide.options), wide.grads, strict=True))
    grads = {"out": named["out"], "lse": torch.zeros_like(lse), **named}
    literal = replace(wide, tensors=unreduced, options=options, grads=tuple(grads.values()))
    sizes = _frozen_norms(literal, out)
    squares = dict.fromkeys(sizes, 0.0)
    generator = torch.Generator().manual_seed(0)
    drawn = literal.grads if magnitudes is None else magnitudes
    for _ in range(_DRAWS):
        signed = replace(literal, grads=tuple(_signed(g, generator) for g in drawn))
        for name, term in _frozen_norms(signed, out).items():
            squares[name] += term**2 / _DRAWS
    sizes = {name: max(size, squares[name] ** 0.5) for name, size in sizes.items()}
    if "dsinks" in sizes:
        # Its summands, one by one: P dO O over every channel, and P dLSE. Rows after the last
        # packed sequence hold NaN gradients and belong to no sum.
        share = torch.exp(wide.tensors["sinks"][:, None] - lse)
        every = (drawn[0] * out).movedim(-2, -3), drawn[1][..., None]
        terms = share[..., None] * torch.cat(every, dim=-1)
        sizes["dsinks"] = norm(terms.where(lse[..., None] > -torch.inf, 0))
    return sizes | epilogue


def _signed(gradient: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, gradient.shape, generator=generator) * 2 - 1
    return gradient * signs.to(gradient.device)


def _frozen_norms(inputs: Inputs, out: Tensor) -> dict[str, float]:
    """Norms of the gradients with the softmax normaliser frozen, and of those through the LSE."""
    grad_out, grad_lse, *mixed = inputs.grads
    # d scores = P (dP - sum(dO O) + dLSE): the dLSE that leaves P dP alone.
    cancel = (grad_out * out).sum(-1).movedim(-1, -2)
    frozen = _outcome(replace(inputs, grads=(grad_out, cancel, *mixed)), "reference")
    nothing = [torch.zeros_like(g) for g in (grad_out, *mixed)]
    only_lse = (nothing[0], grad_lse, *nothing[1:])
    through_lse = _outcome(replace(inputs, grads=only_lse), "reference")
    gradients = [name for name in frozen if name not in _outputs(inputs.options)]
    return {name: norm(frozen[name]) + norm(through_lse[name]) for name in gradients}


def norm(x: Tensor) -> float:
    """The Frobenius norm of the finite elements."""
    x = x.double()
    return float(x[x.isfinite()].norm())


def misfit(got: Tensor, true: Tensor) -> float:
    """The norm of the difference; infinite where NaN and infinities do not lie alike."""
    if got.shape != true.shape:
        return float("inf")
    got = got.double()
    finite = true.isfinite()
    if not torch.equal(got[~finite].nan_to_num(nan=0.5), true[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    error = float((got[finite] - true[finite]).norm())
    return error if error == error else float("inf")

"""Error budgets: float64 decides, the reference in the same precision sets the scale.

    error <= 2 * error(reference in the same precision) + u(dtype) * S

in Frobenius norms, with u the unit roundoff of the inputs' dtype. A gradient that is a cancelling
sum cannot be more exact than its terms allow, so S is the norm of the terms before their reduction
(coefficients, sinks), of the gradient with the softmax normaliser frozen (q, k, additive bias), and
else the norm of the float64 tensor itself. What of those norms hangs on the luck of the signs of
the output gradients is evened out: S is at least its root mean square over random signs. For
gradients the error of the reference is the larger of two: by autograd, and from out and the LSE
alone, which is all that a kernel of linear memory keeps. (By autograd a row with one key cancels
exactly, and a budget of zero would say nothing about precision.)

The reference's error is itself luck: of a tensor with one element it is often near zero. Where a
first look finds an error too large, the reference is run again with its channels in other orders
and its output gradients a few per cent larger or smaller, which changes little but the rounding,
and the largest of its errors counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._core.select import prepare
from resformer_kernels.attention import reference
from resformer_kernels.testing.inputs import AttentionCase, attention_inputs
from resformer_kernels.testing.poison import poisoned

_DRAWS = 3
_ORDERS = 4
_GRADIENTS = ("q", "k", "v", "v_first", "lambda_v", "lambda_first", "sinks", "attn_bias")


@dataclass(frozen=True)
class Comparison:
    """One tensor of a call held against float64. Norms are Frobenius norms."""

    name: str
    """An output ("out", "lse", "mixed") or a gradient ("dq", "dlambda_v", ...)."""
    error: float
    budget: float
    norm: float
    """Of the float64 tensor."""

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
    with poisoned():
        outputs, gradients = _run(function, tensors, options, grads, backend)
    wide = {name: _wide(x) for name, x in tensors.items()}
    wide_grads = tuple(_wide(g) for g in grads)
    exact = _named(options, *_run(function, wide, options, wide_grads, "reference"))
    got = _named(options, outputs, gradients)
    wanted = {name.removeprefix("d") for name in exact if name not in ("out", "lse", "mixed")}
    sizes = _summed_terms(function, wide, options, wide_grads, wanted)
    near = _reference_errors(function, tensors, options, grads, exact)

    unit = torch.finfo(tensors["q"].dtype).eps / 2
    found = []
    for name, true in exact.items():
        size = norm(true)
        budget = 2 * near[name] + unit * sizes.get(name.removeprefix("d"), size)
        found.append(Comparison(name, misfit(got[name], true), budget, size))
    if all(item.ok for item in found):
        return found
    luck = torch.Generator().manual_seed(0)
    for _ in range(_ORDERS):
        other = _redrawn(tensors, options, grads, luck)
        wide = {name: _wide(x) for name, x in other[0].items()}
        wide_grads = tuple(_wide(g) for g in other[1])
        exact = _named(options, *_run(function, wide, options, wide_grads, "reference"))
        errors = _reference_errors(function, other[0], options, other[1], exact)
        near = {name: max(error, errors[name]) for name, error in near.items()}
    return [
        replace(
            item,
            budget=2 * near[item.name] + unit * sizes.get(item.name.removeprefix("d"), item.norm),
        )
        for item in found
    ]


def _named(
    options: Mapping[str, Any], outputs: tuple[Tensor, ...], gradients: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    names = ["out"]
    names += ["lse"] if options.get("return_lse") else []
    names += ["mixed"] if options.get("return_mixed_value") else []
    return {
        **dict(zip(names, outputs, strict=True)),
        **{f"d{name}": gradient for name, gradient in gradients.items()},
    }


def _reference_errors(
    function: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    grads: tuple[Tensor, ...],
    exact: Mapping[str, Tensor],
) -> dict[str, float]:
    """Errors of the reference in the tensors' own precision."""
    near = _named(options, *_run(function, tensors, options, grads, "reference"))
    by_lse = _named(options, *_run(_by_lse(function), tensors, options, grads, "reference"))
    errors = {name: misfit(near[name], true) for name, true in exact.items()}
    for name in errors:
        if name not in ("out", "lse", "mixed"):
            errors[name] = max(errors[name], misfit(by_lse[name], exact[name]))
    return errors


def _redrawn(
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    grads: tuple[Tensor, ...],
    luck: torch.Generator,
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """The same problem up to rounding: other orders of channels, other magnitudes of gradients."""
    value = next(tensors[name] for name in ("v", "v_first") if name in tensors)
    keys = torch.randperm(tensors["q"].shape[-1], generator=luck).to(value.device)
    values = torch.randperm(value.shape[-1], generator=luck).to(value.device)
    # Near 1, so that errors keep their size; the gradients are linear in it.
    factor = 1 + (float(torch.rand((), generator=luck)) - 0.5) / 16

    def move(name: str, x: Tensor) -> Tensor:
        if name in ("q", "k"):
            return x[..., keys]
        by_channel = name in ("v", "v_first", "out", "mixed", "lambda_v", "lambda_first")
        return x[..., values] if by_channel and x.dim() and x.shape[-1] == len(values) else x

    names = _named(options, grads, {})
    return (
        {name: move(name, x) for name, x in tensors.items()},
        tuple(move(name, g) * factor for name, g in names.items()),
    )


def _by_lse(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """`function` on the reference that differentiates from out and the LSE."""

    def run(**arguments: Any) -> tuple[Tensor, ...]:
        request = prepare(function, **arguments)
        found = reference.run_with(reference.attend_by_lse, request.call)
        return tuple(x for x in found if x is not None)

    return run


def _wide(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x


def _run(
    function: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    grads: tuple[Tensor, ...],
    backend: str,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """(outputs, gradients by argument name)."""
    leaves = {
        name: tensors[name].detach().requires_grad_()
        for name in _GRADIENTS
        if name in tensors and tensors[name].is_floating_point()
    }
    outputs = function(**{**tensors, **leaves}, **options, backend=backend)
    if isinstance(outputs, Tensor):
        outputs = (outputs,)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
    return tuple(x.detach() for x in outputs), dict(zip(leaves, gradients, strict=True))


def _summed_terms(
    function: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    grads: tuple[Tensor, ...],
    wanted: set[str],
) -> dict[str, float]:
    """S of every gradient, from float64 arguments."""
    grad_out = grads[0]
    everything = {**options, "return_lse": True}
    # A coefficient in V's full shape has the terms of the reduced one's gradient as its gradient.
    value = next(tensors[name] for name in ("v", "v_first") if name in tensors)
    unreduced = dict(tensors)
    for name in ("lambda_v", "lambda_first"):
        if name in wanted:
            unreduced[name] = tensors[name].expand(value.shape).contiguous()

    with torch.no_grad():
        out, lse, *_ = function(**tensors, **everything, backend="reference")
    grad_lse = grads[1] if options.get("return_lse") else torch.zeros_like(lse)
    mixed = grads[-1:] if options.get("return_mixed_value") else ()

    names = [name for name in _GRADIENTS if name in wanted]
    squares = dict.fromkeys(names, 0.0)
    literal = dict.fromkeys(names, 0.0)
    generator = torch.Generator().manual_seed(0)
    for draw in range(_DRAWS + 1):
        signed = [_signed(g, generator) if draw else g for g in (grad_out, grad_lse, *mixed)]
        terms = _frozen_norms(function, unreduced, everything, signed, out)
        for name in names:
            if draw == 0:
                literal[name] = terms[name]
            else:
                squares[name] += terms[name] ** 2 / _DRAWS
    sizes = {name: max(literal[name], squares[name] ** 0.5) for name in names}
    if "sinks" in wanted:
        # Its summands, one by one: P dO O over every channel, and P dLSE. Rows after the last
        # packed sequence hold NaN gradients and belong to no sum.
        share = torch.exp(tensors["sinks"][:, None] - lse)
        every = torch.cat([(grad_out * out).movedim(-2, -3), grad_lse[..., None]], dim=-1)
        every = share[..., None] * every
        sizes["sinks"] = norm(every.where(lse[..., None] > -torch.inf, 0))
    return sizes


def _signed(gradient: Tensor, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, gradient.shape, generator=generator) * 2 - 1
    return gradient * signs.to(gradient.device)


def _frozen_norms(
    function: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    grads: list[Tensor],
    out: Tensor,
) -> dict[str, float]:
    """Norms of the gradients with the softmax normaliser frozen, and of those through the LSE."""
    grad_out, grad_lse, *mixed = grads
    # d scores = P (dP - sum(dO O) + dLSE): the dLSE that leaves P dP alone.
    cancel = (grad_out * out).sum(-1).movedim(-1, -2)
    _, frozen = _run(function, tensors, options, (grad_out, cancel, *mixed), "reference")
    nothing = [torch.zeros_like(g) for g in (grad_out, *mixed)]
    only_lse = (nothing[0], grad_lse, *nothing[1:])
    _, through_lse = _run(function, tensors, options, only_lse, "reference")
    return {name: norm(frozen[name]) + norm(through_lse[name]) for name in frozen}


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

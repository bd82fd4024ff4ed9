"""Inputs of the scan, and the error budget that every backend is held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from resformer_kernels import linear_scan
from resformer_kernels.scan.record import state_dtype
from resformer_kernels.testing import poisoned

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.complex64)
KINDS = ("decay", "unit", "any", "switch")
LAYOUTS = ("contiguous", "sliced", "strided", "time_first", "expanded")
OUTPUTS = ("both", "states", "final")


@dataclass(frozen=True)
class Case:
    """A scan of (batch, length) steps, or of packed sequences with `tail` rows after the last."""

    dtype: torch.dtype
    channels: int
    batch: int = 2
    length: int = 9
    lengths: tuple[int, ...] | None = None
    tail: int = 0
    constant: bool = False
    """Gates constant in time."""
    kind: str = "decay"
    """Gates in (0, 1); of modulus 1; normal; 0 or 1 or 1.5."""
    wide_gates: bool = False
    """Float32 gates and initial state beside 16-bit tokens."""
    initial: bool = True
    reverse: bool = False
    outputs: str = "both"
    """Which outputs have a gradient."""
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    seed: int = 0

    @property
    def rows(self) -> tuple[int, ...]:
        """Shape of tokens without channels."""
        if self.lengths is None:
            return (self.batch, self.length)
        return (sum(self.lengths) + self.tail,)

    @property
    def sequences(self) -> int:
        """Rows of a state."""
        return self.batch if self.lengths is None else len(self.lengths)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, *, longest: int = 70) -> Case:
    """Any case; an interpreter needs short ones."""
    packed = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, longest // 2), max_size=4)) if packed else None
    return Case(
        dtype=dtype,
        channels=draw(st.one_of(st.integers(1, 40), st.sampled_from([0, 64, 130]))),
        batch=draw(st.integers(0, 4)),
        length=draw(st.integers(0, longest)),
        lengths=None if lengths is None else tuple(lengths),
        tail=draw(st.integers(0, 3)),
        constant=draw(st.booleans()),
        kind=draw(st.sampled_from(KINDS)),
        wide_gates=draw(st.booleans()),
        initial=draw(st.booleans()),
        reverse=draw(st.booleans()),
        outputs=draw(st.sampled_from(OUTPUTS)),
        layout=draw(st.sampled_from(LAYOUTS)),
        grad_layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**20)),
    )


class Inputs(NamedTuple):
    """Leaves in the order of the arguments, the output's gradients, and the packing."""

    leaves: list[Tensor]
    grads: tuple[Tensor, Tensor]
    cu_seqlens: Tensor | None


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x at other strides; "expanded": its first row for all."""
    if layout == "sliced":
        base = x.new_full([size + 3 for size in x.shape], torch.nan)
        return base[tuple(slice(1, 1 + size) for size in x.shape)].copy_(x)
    if layout == "strided":
        return x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)[..., ::2].copy_(x)
    if layout == "time_first" and x.dim() == 3:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded" and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x


def gates_of(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gates in float32 or complex64."""
    kind = case.kind
    normal = torch.randn(shape, generator=generator)
    if kind == "switch":
        sizes = torch.tensor([0.0, 1.0, 1.5])[torch.randint(3, shape, generator=generator)]
    else:
        decay = torch.rand(shape, generator=generator)
        sizes = {"decay": decay, "unit": torch.ones(shape), "any": normal.abs()}[kind]
    if case.constant or case.layout == "expanded":
        sizes = sizes.clamp(max=1.1)  # at every step: 16 bits do not hold larger powers
    if not case.dtype.is_complex:
        return sizes * normal.sign()
    return torch.polar(sizes, 6.3 * torch.rand(shape, generator=generator))


def inputs_of(case: Case) -> Inputs:
    """Rows after the last packed sequence are NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    wide = state_dtype(case.dtype)

    def normal(*shape: int) -> Tensor:
        drawn = torch.complex64 if case.dtype.is_complex else torch.float32
        return torch.randn(shape, generator=generator, dtype=drawn)

    shape = (*case.rows, case.channels)
    tokens, grad = normal(*shape).to(case.dtype), normal(*shape).to(case.dtype)
    form = (case.channels,) if case.constant else shape
    gates = gates_of(case, form, generator)
    gates = gates.to(wide if case.wide_gates else case.dtype)
    state = normal(case.sequences, case.channels)
    if case.tail and case.lengths is not None:
        for x in (tokens, grad, *([] if case.constant else [gates])):
            x[-case.tail :] = torch.nan
    tokens = laid_out(tokens, case.layout)
    gates = gates if case.constant else laid_out(gates, case.layout)
    leaves = [gates, tokens]
    if case.initial:
        leaves.append(laid_out(state.to(wide if case.wide_gates else case.dtype), case.layout))
    grads = (laid_out(grad, case.grad_layout), normal(case.sequences, case.channels).to(wide))
    cu_seqlens = None
    if case.lengths is not None:
        cu_seqlens = torch.tensor([0, *case.lengths]).cumsum(0).int()
    return Inputs(leaves, grads, cu_seqlens)


def run(case: Case, inputs: Inputs, backend: str) -> list[Tensor]:
    """Both outputs, then the gradient of every leaf."""
    leaves = [x.detach().requires_grad_() for x in inputs.leaves]
    initial = leaves[2] if case.initial else None
    outputs = linear_scan(
        leaves[0],
        leaves[1],
        initial,
        reverse=case.reverse,
        cu_seqlens=inputs.cu_seqlens,
        backend=backend,
    )
    used = slice(case.outputs == "final", 1 if case.outputs == "states" else 2)
    # Without steps and without an initial state, the reference's final state is a constant.
    pairs = zip(outputs[used], inputs.grads[used], strict=True)
    known = [(output, grad) for output, grad in pairs if output.requires_grad]
    gradients: Sequence[Tensor] = [torch.zeros_like(x) for x in leaves]
    if known:
        results, grads = zip(*known, strict=True)
        gradients = torch.autograd.grad(results, leaves, grads, materialize_grads=True)
    return [*(x.detach() for x in outputs), *gradients]


def in_float64(inputs: Inputs, *, sizes: bool = False) -> Inputs:
    """The inputs in float64 or complex128; `sizes`: their moduli."""

    def widen(x: Tensor) -> Tensor:
        wide = torch.complex128 if x.is_complex() else torch.float64
        return (x.abs() if sizes else x).to(wide)

    grads = (widen(inputs.grads[0]), widen(inputs.grads[1]))
    return Inputs([widen(x) for x in inputs.leaves], grads, inputs.cu_seqlens)


def scaled(inputs: Inputs, factor: float) -> Inputs:
    """All but the gates times a factor: the scan and its gradients are linear in these."""
    gates, *rest = inputs.leaves
    d_states, d_final = inputs.grads
    grads = (d_states * factor, d_final * factor)
    return Inputs([gates, *(x * factor for x in rest)], grads, inputs.cu_seqlens)


def reference_error(case: Case, inputs: Inputs, i: int) -> float:
    """How far the reference's tensor i is off in the inputs' own precision."""
    near = run(case, inputs, "reference")[i]
    true = run(case, in_float64(inputs), "reference")[i]
    return float((near.to(true.dtype) - true).norm())


def check_budget(case: Case, backend: str) -> None:
    """error <= 2 * error(reference in the same precision) + u * |sums of the terms' moduli|.

    A few numbers may round well in the reference by luck: before an error is called too large, the
    reference tries its luck on the same problem at other magnitudes.
    """
    inputs = inputs_of(case)
    with poisoned():
        got = run(case, inputs, backend)
    near = run(case, inputs, "reference")
    exact = run(case, in_float64(inputs), "reference")
    terms = run(case, in_float64(inputs, sizes=True), "reference")
    part = torch.float32 if case.dtype.is_complex else case.dtype
    unit = torch.finfo(part).eps / 2
    for i, (a, b, true, sums) in enumerate(zip(got, near, exact, terms, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert i > 1 or a.is_contiguous()
        error = float((a.to(true.dtype) - true).norm())
        rounding = unit * float(sums.norm())
        budget = 2 * float((b.to(true.dtype) - true).norm()) + rounding
        if error > budget:
            tries = (scaled(inputs, factor) for factor in (1.013, 1.026, 1.039, 1.052))
            budget = 2 * max(reference_error(case, other, i) for other in tries) + rounding
        assert error <= budget, f"tensor {i} of {case}: error {error:.3e} > {budget:.3e}"

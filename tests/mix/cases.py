"""Inputs of the mixing ops, and the error budget that every backend is held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from resformer_kernels import mix_value_embedding, mix_values
from resformer_kernels.testing import LAYOUTS, laid_out, poisoned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = ("float", "scalar", "head", "channel", "dim", "token", "token_head", "full", "position")


@dataclass(frozen=True)
class Case:
    """A mix of as many values as there are forms, or (one form) of v and rows of a table."""

    rows: tuple[int, ...]
    """(batch, time), or (total,) if packed."""
    heads: int
    dim: int
    dtype: torch.dtype
    forms: tuple[str, ...]
    same_dtype: bool = False
    """Tensor coefficients have the values' dtype rather than float32."""
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    vocab: int = 7
    wide_table: bool = False
    small_ids: bool = False
    sparse_grad: bool = False
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows, self.heads, self.dim)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype, *, sources: int | None = None) -> Case:
    """Any case; `sources` fixes how many coefficients there are."""
    rows = draw(
        st.one_of(
            st.tuples(st.integers(0, 5), st.integers(0, 40)),
            st.tuples(st.integers(0, 90)),
            st.tuples(st.integers(6, 80), st.integers(1, 2)),
        )
    )
    count = draw(st.integers(1, 6)) if sources is None else sources
    return Case(
        rows=rows,
        heads=draw(st.integers(1, 5)),
        dim=draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 530]))),
        dtype=dtype,
        forms=tuple(draw(st.sampled_from(FORMS)) for _ in range(count)),
        same_dtype=draw(st.booleans()),
        layout=draw(st.sampled_from(LAYOUTS)),
        grad_layout=draw(st.sampled_from(LAYOUTS)),
        vocab=draw(st.sampled_from([1, 7, 300])),
        wide_table=draw(st.booleans()),
        small_ids=draw(st.booleans()),
        sparse_grad=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


def form_shape(form: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    rows, (heads, dim) = shape[:-2], shape[-2:]
    return {
        "scalar": (),
        "head": (heads, 1),
        "channel": (heads, dim),
        "dim": (1, dim),
        "token": (*rows, 1, 1),
        "token_head": (*rows, heads, 1),
        "full": shape,
        "position": (1, *rows[1:], 1, dim) if len(rows) == 2 else (*rows, 1, dim),
    }[form]


@dataclass(frozen=True)
class Call:
    """`function(*tensors)`: every floating tensor is a leaf. `terms` are of leaves' gradients."""

    function: Callable[..., Tensor]
    leaves: list[Tensor]
    grad: Tensor
    terms: Callable[[list[Tensor], Tensor], list[Tensor | None]]
    """From float64 leaves and gradient: the terms whose sum a leaf's gradient is, or None."""


def _coefficients(case: Case, generator: torch.Generator) -> list[Any]:
    dtype = case.dtype if case.same_dtype else torch.float32
    found: list[Any] = []
    for i, form in enumerate(case.forms):
        if form == "float":
            found.append(0.7 - i)
        else:
            shape = form_shape(form, case.shape)
            found.append(torch.randn(shape, generator=generator).to(dtype))
    return found


def values_call(case: Case, backend: str) -> Call:
    generator = torch.Generator().manual_seed(case.seed)
    count = len(case.forms)

    def normal(layout: str) -> Tensor:
        return laid_out(torch.randn(case.shape, generator=generator).to(case.dtype), layout)

    values = [normal(case.layout) for _ in range(count)]
    coefficients = _coefficients(case, generator)
    tensors = [c for c in coefficients if isinstance(c, Tensor)]

    def function(*leaves: Tensor) -> Tensor:
        rest = iter(leaves[count:])
        mixed = [next(rest) if isinstance(c, Tensor) else c for c in coefficients]
        return mix_values(leaves[:count], mixed, backend=backend)

    def terms(leaves: list[Tensor], grad: Tensor) -> list[Tensor | None]:
        weighed = [
            value
            for value, c in zip(leaves[:count], coefficients, strict=True)
            if isinstance(c, Tensor)
        ]
        return [*[None] * count, *(grad * value for value in weighed)]

    return Call(function, [*values, *tensors], normal(case.grad_layout), terms)


def embedding_call(case: Case, backend: str) -> Call:
    generator = torch.Generator().manual_seed(case.seed)

    def normal(shape: tuple[int, ...], layout: str, dtype: torch.dtype = case.dtype) -> Tensor:
        return laid_out(torch.randn(shape, generator=generator).to(dtype), layout)

    v = normal(case.shape, case.layout)
    wide = torch.float32 if case.wide_table else case.dtype
    table = normal((case.vocab, *case.shape[-2:]), case.layout, wide)
    ids = torch.randint(case.vocab, case.rows, generator=generator)
    ids = ids.to(torch.int32) if case.small_ids else ids
    if len(case.rows) == 2:
        ids = ids.t().contiguous().t()
    (gate,) = _coefficients(case, generator)
    tensors = [gate] if isinstance(gate, Tensor) else []

    def function(v: Tensor, table: Tensor, *gates: Tensor) -> Tensor:
        g = gates[0] if gates else gate
        return mix_value_embedding(v, table, ids, g, sparse_grad=case.sparse_grad, backend=backend)

    def terms(leaves: list[Tensor], grad: Tensor) -> list[Tensor | None]:
        weight = leaves[2] if tensors else gate
        return [None, weight * grad, *(grad * leaves[1][ids.long()] for _ in tensors)]

    return Call(function, [v, table, *tensors], normal(case.shape, case.grad_layout), terms)


def run(call: Call, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, then the gradient of every leaf, dense."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = call.function(*leaves)
    gradients = torch.autograd.grad(out, leaves, grad)
    return [out.detach(), *(g.to_dense() if g.is_sparse else g for g in gradients)]


def check_budget(make: Callable[[Case, str], Call], case: Case, backend: str) -> None:
    """error <= 2 * error(reference in the same precision) + u * |summed terms|, against float64."""
    call, same = make(case, backend), make(case, "reference")
    with poisoned():
        got = run(call, call.leaves, call.grad)
    near = run(same, same.leaves, same.grad)
    wide = [x.double() for x in same.leaves]
    exact = run(same, wide, same.grad.double())
    terms = [None, *same.terms(wide, same.grad.double())]
    unit = torch.finfo(case.dtype).eps / 2
    for i, (a, b, true, summed) in enumerate(zip(got, near, exact, terms, strict=True)):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert i > 0 or a.is_contiguous()
        size = float((true if summed is None else summed).norm())
        error = float((a.double() - true).norm())
        budget = 2 * float((b.double() - true).norm()) + unit * size
        assert error <= budget, f"tensor {i} of {case}: error {error:.3e} > {budget:.3e}"

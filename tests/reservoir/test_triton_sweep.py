"""The Triton kernel, in Triton's interpreter, held against float64 over every argument."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.reservoir.cases import KINDS, Case, cases, check_budget, in_interpreter, sweep

pytest.importorskip("triton")
pytestmark = in_interpreter


def short(case: Case, units: int = 40, steps: int = 6) -> Case:
    """A case small enough for the interpreter."""
    lengths = case.lengths if case.lengths is None else tuple(n % (steps + 1) for n in case.lengths)
    return dataclasses.replace(
        case, units=min(case.units, units), steps=min(case.steps, steps), lengths=lengths
    )


@pytest.mark.parametrize("kind", KINDS)
@sweep(4)
@given(data=st.data())
def test_stays_within_budget(kind: str, data: st.DataObject) -> None:
    check_budget(short(data.draw(cases(kind))), "triton")


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("batch", [1, 17])
def test_whole_tiles_and_sums_in_parts(batch: int, narrow: bool) -> None:
    check_budget(Case(units=140, batch=batch, steps=3, narrow=narrow, inputs=33), "triton")


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_stay_within_budget(kind: str) -> None:
    lengths = (50, 0, 3, 41) if kind in ("groups", "csr") else None
    options = {"tolerance": 0.0}
    case = Case(kind, 20, batch=1, steps=70, lengths=lengths, mode="chunked", options=options)
    check_budget(case, "triton")

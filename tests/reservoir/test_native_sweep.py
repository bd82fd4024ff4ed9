"""The native kernels held against float64 over every argument, on every CPU path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reservoir.cases import KINDS, Case, cases, check_budget, empty, sweep

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("cpu_path")
@sweep(8)
@given(data=st.data())
def test_stays_within_budget(kind: str, data: st.DataObject) -> None:
    check_budget(data.draw(cases(kind)), "native")


@pytest.mark.usefixtures("cpu_path")
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 13])
def test_whole_panels(batch: int, narrow: bool) -> None:
    check_budget(Case(units=384, batch=batch, steps=12, narrow=narrow, inputs=70), "native")


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bits(threads: int) -> None:
    from resformer_kernels import reservoir_scan

    u, w = torch.randn(1, 300, 400), torch.randn(400, 400) / 20
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = [reservoir_scan(u, w, mode=mode) for mode in ("sequential", "chunked")]
        torch.set_num_threads(threads)
        found = [reservoir_scan(u, w, mode=mode) for mode in ("sequential", "chunked")]
    finally:
        torch.set_num_threads(before)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@empty
@pytest.mark.parametrize("kind", ["dense", "ring"])
def test_empty(
    kind: str, batch: int, steps: int, lengths: tuple[int, ...] | None, backend: str
) -> None:
    check_budget(Case(kind, batch=batch, steps=steps, lengths=lengths), backend)

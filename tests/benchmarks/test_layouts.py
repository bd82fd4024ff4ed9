"""Peers are timed in the layout that is best for them (`--check-layouts`, on a quiet machine)."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from benchmarks import layouts, registry
from benchmarks.workloads.attention import CPUAttention
from benchmarks.workloads.common import COMPILED
from benchmarks.workloads.decode import DecodeBenchmark
from benchmarks.workloads.mix import MixBenchmark
from benchmarks.workloads.reservoir import ReservoirBenchmark
from benchmarks.workloads.scan import ASSOCIATIVE, LOOP, ScanBenchmark
from resformer_kernels.bench.timing import Benchmark, Call, Unavailable

SMALL: tuple[Benchmark, ...] = (
    CPUAttention(1, 2, 2, 12, 8, torch.float32, "forward", peers=(COMPILED,)),
    DecodeBenchmark(2, 4, 2, 16, 8, torch.float32, layers=2),
    MixBenchmark(2, 1, 16, 2, 8, torch.float32, "forward", compiles=True),
    ReservoirBenchmark(60, 1, 9),
    ScanBenchmark(2, 16, 3, torch.float32, "forward", peers=(LOOP, ASSOCIATIVE)),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The registry's cases, where they are to be timed."""
    if "case_to_time" not in metafunc.fixturenames:
        return
    timed = metafunc.config.getoption("check_layouts")
    cases = [case for case in registry.cases() if layouts.alternatives(case)] if timed else []
    metafunc.parametrize("case_to_time", cases, ids=lambda case: case.name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Sparse CSR tensor support")
def test_no_peer_is_quicker_in_another_layout(case_to_time: Benchmark) -> None:
    """`--log-cli-level=INFO` shows the ratios."""
    found = layouts.slower_than_elsewhere(case_to_time, layouts.alternatives(case_to_time))
    ratios = {name: f"{gain:.2f}x" for name, gain in found.items()}
    logging.getLogger(__name__).info("%s: %s", case_to_time.name, ratios)
    assert {name: gain for name, gain in found.items() if gain > 1 + layouts.MOST_GAIN} == {}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_every_kind_of_case_names_layouts_of_its_peers(case: Benchmark) -> None:
    found = layouts.alternatives(case)
    assert found
    for names, label, _make in found:
        assert label not in names
        assert set(names) & set(case.makers())


def test_layouts_hold_the_same_numbers() -> None:
    case = SMALL[4]
    for names, _label, make in layouts.alternatives(case):
        torch.manual_seed(0)
        other = make()()
        torch.manual_seed(0)
        own = case.makers()[names[0]]()()
        assert isinstance(own, Tensor)
        assert isinstance(other, Tensor)
        turned = other if other.shape == own.shape else other.transpose(1, 2)
        torch.testing.assert_close(turned, own)
    cache = torch.randn(2, 16, 3, 8)
    (view,) = layouts.length_first([cache])
    assert torch.equal(view, cache.transpose(1, 2))
    assert view.permute(2, 0, 1, 3).is_contiguous()


def test_a_quicker_layout_is_found() -> None:
    case = SMALL[4]
    ways = [
        layouts.Alternative((LOOP,), "nothing to do", lambda: lambda: None),
        layouts.Alternative((ASSOCIATIVE,), "not here", _absent),
    ]
    found = layouts.slower_than_elsewhere(case, ways, samples=2)
    assert list(found) == [f"{LOOP}: nothing to do"]
    assert found[f"{LOOP}: nothing to do"] > 1 + layouts.MOST_GAIN


def _absent() -> Call:
    raise Unavailable("not here")

"""Cases that device-check times beside attention: they run, and say where no kernel serves them."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

from benchmarks.workloads.decode import FOLDED, GQA, OWN_VALUES, DecodeBenchmark
from benchmarks.workloads.reservoir import CUDA, ReservoirBenchmark
from resformer_kernels.bench.timing import OURS, Unavailable

DECODE = DecodeBenchmark(2, 4, 2, 16, 8, torch.float32, layers=2)
CASES = (
    (DECODE, {OURS, GQA, FOLDED}),
    (dataclasses.replace(DECODE, shared=True), {OURS, OWN_VALUES}),
    (ReservoirBenchmark(8, 2, 20), {OURS, "torch loop", "nn.RNN"}),
    (ReservoirBenchmark(8, 2, 40, mode="chunked"), {OURS, "torch loop", "nn.RNN"}),
)


@pytest.mark.parametrize(("case", "names"), CASES, ids=[case.name for case, _ in CASES])
def test_every_contestant_runs(
    case: DecodeBenchmark | ReservoirBenchmark, names: set[str], native: str
) -> None:
    assert native == "native"
    found = set()
    for name, make in case.makers().items():
        # flash-attn has no CPU kernel, and ReservoirPy takes one sequence: neither is named.
        with contextlib.suppress(Unavailable):
            make()()
            found.add(name)
    assert found == names


@pytest.mark.parametrize("case", [case for case, _ in CASES], ids=lambda case: case.name)
def test_ours_says_where_no_kernel_serves_it(case: DecodeBenchmark | ReservoirBenchmark) -> None:
    makers = dataclasses.replace(case, device="meta").makers()
    with pytest.raises(Unavailable, match="these are on meta"):
        makers[OURS]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_has_the_cuda_kernel_beside_what_auto_takes(dtype: torch.dtype) -> None:
    makers = ReservoirBenchmark(8, 2, 20, dtype, device="meta").makers()
    assert [*makers][:2] == [OURS, CUDA]
    with pytest.raises(Unavailable, match=r"no kernel serves it .*native: .*these are on meta"):
        makers[CUDA]()
    assert CUDA not in ReservoirBenchmark(8, 2, 20, dtype, mode="chunked", device="meta").makers()


def test_a_mode_that_was_asked_for_is_in_the_name() -> None:
    assert ReservoirBenchmark(8, 1, 20).name == "reservoir_scan dense B1 T20 N8 float32"
    named = ReservoirBenchmark(8, 1, 20, mode="chunked").name
    assert named == "reservoir_scan dense B1 T20 N8 chunked float32"

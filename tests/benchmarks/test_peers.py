"""Peers compute what ours does, and say why where they take no part."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.call_memory import peak_call_bytes, unavailable_reason
from benchmarks.workloads import reservoir as reservoir_workloads
from benchmarks.workloads import scan as scan_workloads
from benchmarks.workloads.attention import MATH, X_TRANSFORMERS, CPUAttention
from benchmarks.workloads.common import FLASH_ATTN
from benchmarks.workloads.decode import (
    FOLDED,
    GQA,
    OWN_VALUES,
    TIME_FIRST,
    DecodeBenchmark,
    _contiguous,
    _viewed,
)
from benchmarks.workloads.device import FA3, FLEX
from benchmarks.workloads.model import DYNAMIC, STATIC, ModelBenchmark
from benchmarks.workloads.reservoir import (
    CUDA,
    JAX,
    LOOP,
    LOOP_CSR,
    RESDAG,
    RESERVOIRPY,
    RNN,
    ReservoirBenchmark,
)
from benchmarks.workloads.scan import ACCELERATED, ASSOCIATIVE, FLA, ScanBenchmark
from resformer_kernels.bench.timing import OURS, Benchmark, Unavailable

IN_BOTH_LAYOUTS = (GQA, GQA + TIME_FIRST, FOLDED, FOLDED + TIME_FIRST)
ATTENTION = CPUAttention(
    *(1, 2, 2, 12, 8, torch.float32, "forward"), peers=(X_TRANSFORMERS, MATH, FLEX, FA3)
)
SCAN = ScanBenchmark(2, 16, 3, torch.float32, "forward", peers=(ASSOCIATIVE, FLA, ACCELERATED))


def test_x_transformers_attends_over_the_mix() -> None:
    pytest.importorskip("x_transformers")
    out = ATTENTION.makers()[X_TRANSFORMERS]()()
    q, k, v, v_first, *_ = ATTENTION.leaves(heads_first=True)
    mixed = 0.5 * v + 0.5 * v_first
    expected = F.scaled_dot_product_attention(q, k, mixed, is_causal=True)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2))


def absent(case: Benchmark, name: str, reason: str, **changes: Any) -> None:
    """Check that a contestant of a changed case is unavailable for a reason."""
    with pytest.raises(Unavailable, match=reason):
        replace(case, **changes).makers()[name]()  # type: ignore[type-var]


def test_attention_peers_say_why_not() -> None:
    absent(ATTENTION, FA3, r"flash_attn_interface (is not installed|runs on CUDA tensors alone)")
    absent(ATTENTION, FLEX, "no backward", direction="backward")
    absent(ATTENTION, MATH, "GiB of scores", length=16384)
    absent(ATTENTION, X_TRANSFORMERS, "one width|not installed", heads=4)


def test_decoding_takes_the_peers_that_differ() -> None:
    case = DecodeBenchmark(1, 4, 2, 8, 8, torch.bfloat16, layers=2)
    assert set(case.makers()) == {OURS, *IN_BOTH_LAYOUTS, FLASH_ATTN}
    assert set(replace(case, heads=2).makers()) == {OURS, GQA, GQA + TIME_FIRST, FLASH_ATTN}
    assert set(replace(case, shared=True).makers()) == {OURS, OWN_VALUES}
    absent(case, GQA, "takes seconds", length=2**24)
    replace(case, heads=2).makers()[GQA]()()


@pytest.mark.parametrize("shared", [False, True])
def test_models_of_transformers_decode_alike(shared: bool) -> None:
    pytest.importorskip("transformers")
    makers = ModelBenchmark(2, 9, torch.float32, shared, layers=2).makers()
    assert set(makers) == {OURS, DYNAMIC, OWN_VALUES if shared else STATIC}
    logits: dict[str, Any] = {name: make()() for name, make in makers.items()}
    again = {name: make() for name, make in makers.items()}
    for name in logits.keys() - {OWN_VALUES}:
        torch.testing.assert_close(logits[name], logits[OURS], rtol=1e-4, atol=1e-5)
        again[name]()
        # Every step appends at the same place.
        torch.testing.assert_close(again[name](), logits[name], rtol=0, atol=0)
    if shared:
        assert not torch.allclose(logits[OWN_VALUES], logits[OURS], atol=1e-3)


def naive(log_gates: Tensor, tokens: Tensor) -> Tensor:
    return scan_workloads.scan_by_loop(log_gates.exp(), tokens)


def test_scans_of_other_packages_are_called_as_they_want(monkeypatch: pytest.MonkeyPatch) -> None:
    hgrn: Any = ModuleType("fla.ops.hgrn")
    hgrn.chunk_hgrn = lambda x, g: (naive(g, x), None)
    warp: Any = ModuleType("accelerated_scan.warp")
    warp.scan = lambda gates, tokens: scan_workloads.scan_by_loop(
        gates.transpose(1, 2), tokens.transpose(1, 2)
    ).transpose(1, 2)
    for name in ("fla", "fla.ops", "accelerated_scan"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.hgrn", hgrn)
    monkeypatch.setitem(sys.modules, "accelerated_scan.warp", warp)
    gates, tokens = torch.rand(2, 16, 3), torch.randn(2, 16, 3)
    expected = scan_workloads.scan_by_loop(gates, tokens)
    for scan in (scan_workloads.scan_by_fla, scan_workloads.scan_by_association):
        torch.testing.assert_close(scan(gates, tokens), expected)
    turned = scan_workloads.time_last(gates, tokens)
    for found in (
        scan_workloads.scan_by_acceleration(*turned),
        scan_workloads.scan_by_association(*turned, dim=2),
    ):
        torch.testing.assert_close(found.transpose(1, 2), expected)
    constant = gates[0, 0]
    torch.testing.assert_close(
        scan_workloads.scan_by_fla(constant, tokens),
        scan_workloads.scan_by_loop(constant, tokens),
    )


@pytest.mark.parametrize("name", [FLA, ACCELERATED])
def test_scans_for_gpus_are_absent_on_a_cpu(name: str) -> None:
    absent(SCAN, name, r"is not installed|runs on CUDA tensors alone")


def test_the_parallel_scan_is_left_out_where_it_takes_minutes() -> None:
    absent(SCAN, ASSOCIATIVE, "minutes", direction="backward")
    absent(SCAN, ASSOCIATIVE, "many seconds", length=2**23)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_reservoirs_agree(sparse: bool) -> None:
    case = ReservoirBenchmark(6, 2, 9, sparse=sparse)
    ours: Any = case.makers()[OURS]()()
    leaves = case._tensors()
    torch.testing.assert_close(reservoir_workloads._plain_loop(*leaves), ours)
    torch.testing.assert_close(reservoir_workloads._loop(*leaves), ours.transpose(0, 1))


def test_gradients_of_reservoirs_agree() -> None:
    case = ReservoirBenchmark(6, 1, 9, direction="backward")
    torch.manual_seed(0)
    ours: Any = case.makers()[OURS]()()
    torch.manual_seed(0)
    loop: Any = case.makers()[LOOP]()()
    assert len(ours) == 3
    for mine, theirs in zip(ours, loop, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    rnn: Any = case.makers()[RNN]()()
    assert rnn[0].shape == (1, 9, 1)


def test_reservoirpy_steps_one_sequence_forward() -> None:
    pytest.importorskip("reservoirpy")
    case = ReservoirBenchmark(6, 1, 9)
    states: Any = case.makers()[RESERVOIRPY]()()
    assert states.shape == (9, 6)
    absent(case, RESERVOIRPY, "one sequence", batch=2)
    absent(case, RESERVOIRPY, "no gradients", direction="backward")


@pytest.mark.parametrize(("name", "package"), [(JAX, "jax"), (RESDAG, "resdag")])
@pytest.mark.parametrize("sparse", [False, True])
def test_other_libraries_step_our_weights(name: str, package: str, sparse: bool) -> None:
    case = ReservoirBenchmark(60, 1, 9, sparse=sparse)
    if importlib.util.find_spec(package) is None:
        absent(case, name, f"{package} is not installed")
        return
    found: Any = case.makers()[name]()()
    ours: Any = case.makers()[OURS]()()
    # JAX's arrays have one sequence; torch reads them through numpy.
    torch.testing.assert_close(torch.as_tensor(np.array(found)).view(1, 9, 60), ours)
    absent(case, name, "has no gradients|are frozen", direction="backward")


def test_a_module_steps_as_its_op() -> None:
    case = ReservoirBenchmark(60, 2, 9, sparse=True, module=True)
    assert case.name == "nn.Reservoir B2 T9 N60 float32"
    states: Any = case.makers()[OURS]()()
    assert states.shape == (2, 9, 60)
    absent(case, OURS, "forward alone", direction="backward")


def test_the_loop_on_csr_agrees() -> None:
    case = ReservoirBenchmark(60, 2, 9, sparse=True)
    found: Any = case.makers()[LOOP_CSR]()()
    ours: Any = case.makers()[OURS]()()
    torch.testing.assert_close(found.permute(2, 0, 1), ours)
    absent(case, LOOP_CSR, "forward alone", direction="backward")


@pytest.mark.skipif(unavailable_reason() is not None, reason="peak memory is not to be had here")
def test_the_memory_of_a_call_is_its_peak() -> None:
    size = 64 * 2**20

    def call() -> Tensor:
        scratch = torch.ones(size, dtype=torch.uint8)
        return scratch[: size // 8].clone()

    assert size <= peak_call_bytes(call) < 1.5 * size
    assert peak_call_bytes(lambda: None) < 2**20


DECODE = DecodeBenchmark(2, 4, 2, 16, 8, torch.float32, layers=2)
CASES = (
    (DECODE, {OURS, *IN_BOTH_LAYOUTS}),
    (replace(DECODE, shared=True), {OURS, OWN_VALUES}),
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
    absent(case, OURS, "these are on meta", device="meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_has_the_cuda_kernel_beside_what_auto_takes(dtype: torch.dtype) -> None:
    case = ReservoirBenchmark(8, 2, 20, dtype, device="meta")
    assert [*case.makers()][:2] == [OURS, CUDA]
    absent(case, CUDA, r"no kernel serves it .*native: .*these are on meta")
    assert CUDA not in ReservoirBenchmark(8, 2, 20, dtype, mode="chunked", device="meta").makers()


def test_a_mode_that_was_asked_for_is_in_the_name() -> None:
    assert ReservoirBenchmark(8, 1, 20).name == "reservoir_scan dense B1 T20 N8 float32"
    named = ReservoirBenchmark(8, 1, 20, mode="chunked").name
    assert named == "reservoir_scan dense B1 T20 N8 chunked float32"


def test_decoding_peers_get_a_layout_of_their_own() -> None:
    caches = [torch.randn(2, 5, 3, 4)]
    for found, contiguous in ((_contiguous(caches), True), (_viewed(caches), False)):
        assert torch.equal(found[0], caches[0].transpose(1, 2))
        assert found[0].is_contiguous() is contiguous

"""Peers compute what ours does, and say why where they take no part."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.call_memory import peak_call_bytes, unavailable_reason
from benchmarks.workloads import scan as scan_workloads
from benchmarks.workloads.attention import MATH, X_TRANSFORMERS, CPUAttention
from benchmarks.workloads.common import FLASH_ATTN
from benchmarks.workloads.decode import FOLDED, GQA, OWN_VALUES, DecodeBenchmark
from benchmarks.workloads.device import FA3, FLEX
from benchmarks.workloads.model import DYNAMIC, STATIC, ModelBenchmark
from benchmarks.workloads.reservoir import (
    LOOP,
    RESERVOIRPY,
    RNN,
    ReservoirBenchmark,
    _loop,
    _plain_loop,
)
from benchmarks.workloads.scan import ACCELERATED, ASSOCIATIVE, FLA, ScanBenchmark
from resformer_kernels.bench.timing import OURS, Unavailable

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


def test_attention_peers_say_why_not() -> None:
    def reason(name: str, case: CPUAttention = ATTENTION) -> str:
        with pytest.raises(Unavailable) as caught:
            case.makers()[name]()
        return str(caught.value)

    assert reason(FA3) in (
        "flash_attn_interface is not installed",
        "flash_attn_interface runs on CUDA tensors alone",
    )
    assert "no backward" in reason(FLEX, replace(ATTENTION, direction="backward"))
    assert "GiB of scores" in reason(MATH, replace(ATTENTION, length=16384))
    if "not installed" not in reason(X_TRANSFORMERS, replace(ATTENTION, heads=4)):
        assert "one width" in reason(X_TRANSFORMERS, replace(ATTENTION, heads=4))


def test_decoding_takes_the_peers_that_differ() -> None:
    case = DecodeBenchmark(1, 4, 2, 8, 8, torch.bfloat16, layers=2)
    assert set(case.makers()) == {OURS, GQA, FOLDED, FLASH_ATTN}
    assert set(replace(case, heads=2).makers()) == {OURS, GQA, FLASH_ATTN}
    assert set(replace(case, shared=True).makers()) == {OURS, OWN_VALUES}
    for name in (OURS, GQA, FOLDED):
        case.makers()[name]()()
    with pytest.raises(Unavailable, match="takes seconds"):
        replace(case, length=2**24).makers()[GQA]()
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
    for scan in (
        scan_workloads.scan_by_fla,
        scan_workloads.scan_by_acceleration,
        scan_workloads.scan_by_association,
    ):
        torch.testing.assert_close(scan(gates, tokens), expected)
    constant = gates[0, 0]
    torch.testing.assert_close(
        scan_workloads.scan_by_fla(constant, tokens),
        scan_workloads.scan_by_loop(constant, tokens),
    )


@pytest.mark.parametrize("name", [FLA, ACCELERATED])
def test_scans_for_gpus_are_absent_on_a_cpu(name: str) -> None:
    with pytest.raises(Unavailable, match=r"is not installed|runs on CUDA tensors alone"):
        SCAN.makers()[name]()


def test_the_parallel_scan_is_left_out_where_it_takes_minutes() -> None:
    with pytest.raises(Unavailable, match="minutes"):
        replace(SCAN, direction="backward").makers()[ASSOCIATIVE]()
    with pytest.raises(Unavailable, match="many seconds"):
        replace(SCAN, length=2**23).makers()[ASSOCIATIVE]()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_reservoirs_agree(sparse: bool) -> None:
    case = ReservoirBenchmark(6, 2, 9, sparse=sparse)
    ours = case.makers()[OURS]()()
    inputs, weight, projection = case._tensors()
    torch.testing.assert_close(_plain_loop(inputs, weight, projection), ours)
    torch.testing.assert_close(_loop(inputs, weight, projection), _time_first(ours))


def _time_first(states: object) -> Tensor:
    assert isinstance(states, Tensor)
    return states.transpose(0, 1)


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
    with pytest.raises(Unavailable, match="one sequence"):
        replace(case, batch=2).makers()[RESERVOIRPY]()
    with pytest.raises(Unavailable, match="no gradients"):
        replace(case, direction="backward").makers()[RESERVOIRPY]()


@pytest.mark.skipif(unavailable_reason() is not None, reason="peak memory is not to be had here")
def test_the_memory_of_a_call_is_its_peak() -> None:
    size = 64 * 2**20

    def call() -> Tensor:
        scratch = torch.ones(size, dtype=torch.uint8)
        return scratch[: size // 8].clone()

    assert size <= peak_call_bytes(call) < 1.5 * size
    assert peak_call_bytes(lambda: None) < 2**20

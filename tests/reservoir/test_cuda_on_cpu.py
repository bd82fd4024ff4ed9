"""The CUDA kernel of the sequential mode and its launch, run on a CPU by four blocks that exchange
states: with shared memory for all of W in one block, and with hardly enough in all four."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from resformer_kernels import explain, reservoir_scan
from resformer_kernels._core import extension
from resformer_kernels._triton import available
from resformer_kernels.reservoir import api, native, reference
from resformer_kernels.reservoir import op as ops
from resformer_kernels.reservoir.cuda_plan import fits
from resformer_kernels.reservoir.record import ReducedCall
from tests.cuda_on_cpu import build
from tests.reservoir.cases import Case, cases, check_budget, empty, sweep
from tests.reservoir.checks import BY_KERNELS, check_not_finite, check_refusals, ops_of

NAMESPACE = "resformer_reservoir_cuda_on_cpu"
BLOCK_BYTES = "CUDA_ON_CPU_BLOCK_BYTES"
BLOCKS, LARGE = 4, 227 * 1024


@dataclasses.dataclass(frozen=True)
class CudaOnCpu:
    """The backend for dense and grouped weights; `tight`: with no more memory than a call needs."""

    NAME: str
    tight: bool

    def unsupported_reason(self, _call: ReducedCall, _hardware: object) -> None:
        return None

    def run(self, call: ReducedCall) -> Any:
        # A backward has it too.
        os.environ[BLOCK_BYTES] = str(least_bytes(call) if self.tight else LARGE)
        return ops.run(NAMESPACE, call)


def least_bytes(call: ReducedCall) -> int:
    """About the smallest shared memory per block that is enough."""
    needed = 256
    while native.too_large(call.scan, BLOCKS, needed) is not None:
        needed += needed // 8
    return needed


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    libraries = [op.define(NAMESPACE) for op in ops.OPS]
    folder = tmp_path_factory.mktemp("reservoir_cuda")
    torch.ops.load_library(str(build("reservoir/reservoir_cuda.cu", NAMESPACE, folder)))
    yield
    del libraries


@pytest.fixture(autouse=True)
def backend(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    del built
    backends = (CudaOnCpu("cuda", False), CudaOnCpu("tight", True), reference)
    monkeypatch.setattr(api, "BACKENDS", backends)
    monkeypatch.setenv(BLOCK_BYTES, str(LARGE))


by_memory = pytest.mark.parametrize("backend_name", ["cuda", "tight"])


@by_memory
@pytest.mark.parametrize("kind", ["dense", "groups"])
@sweep(15)
@given(data=st.data())
def test_stays_within_budget(kind: str, backend_name: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    lengths = None if case.lengths is None else tuple(n % 8 for n in case.lengths)
    short = dataclasses.replace(
        case, units=min(case.units, 40), steps=min(case.steps, 7), lengths=lengths
    )
    check_budget(short, backend_name)


@by_memory
@pytest.mark.parametrize("batch", [1, 9])
def test_vectors_longer_than_a_warp(backend_name: str, batch: int) -> None:
    case = Case(units=141, batch=batch, steps=3, narrow=batch > 1, inputs=130)
    check_budget(case, backend_name)


@empty
def test_empty(batch: int, steps: int, lengths: tuple[int, ...] | None) -> None:
    check_budget(Case(batch=batch, steps=steps, lengths=lengths), "cuda")


@pytest.mark.parametrize("activation", BY_KERNELS)
def test_what_is_not_finite_spreads_as_in_the_reference(activation: str) -> None:
    u, weight = torch.randn(2, 8, 12), torch.randn(12, 12) / 8
    u[0, 3, 3], u[1, 5, 0] = torch.nan, torch.inf
    check_not_finite(u, weight, "cuda", activation=activation)


def test_a_stream_has_the_same_bits_however_it_is_cut_and_shared_out() -> None:
    u, weight = torch.randn(7, 12, 33), torch.randn(33, 33) / 4
    whole, last = reservoir_scan(u, weight, leak=0.5, backend="tight")
    first, state = reservoir_scan(u[:, :5], weight, leak=0.5, backend="cuda")
    second, end = reservoir_scan(u[:, 5:], weight, leak=0.5, initial_state=state, backend="tight")
    alone, _ = reservoir_scan(u[3:4], weight, leak=0.5, backend="tight")
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(end, last)
    assert torch.equal(alone[0], whole[3])


@pytest.mark.parametrize("reduce", ["last", "mean", "gram"])
def test_reductions(reduce: str) -> None:
    u, weight = torch.randn(3, 12, 9), torch.randn(9, 9) / 4
    options: dict[str, Any] = {"leak": 0.5, "reduce": reduce}
    expected, _ = reservoir_scan(u, weight, backend="reference", **options)
    got, _ = reservoir_scan(u, weight, backend="tight", **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_what_it_tells() -> None:
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    _, _, info = reservoir_scan(
        torch.randn(9, 5), torch.randn(5, 5), cu_seqlens=offsets, backend="cuda", return_info=True
    )
    assert [x.item() for x in info] == [2, 1, 0.0, 1.0, True]


def test_the_ops_check_what_they_are_given() -> None:
    check_refusals(
        NAMESPACE,
        [
            {"weight": torch.ones(4), "columns": torch.arange(4)},
            {"cu_seqlens": torch.tensor([0, 2])},
            {"inputs": torch.randn(1, 1, 500), "weight": torch.randn(500, 500)},
        ],
        [
            {"slope": torch.randn(1, 5, 4)},
            {"weight": torch.ones(4), "columns": torch.arange(4)},
        ],
    )


def test_memory_is_said_to_do_where_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    forward, _ = ops_of(NAMESPACE)
    luck = random.Random(3)
    answers = []
    for _ in range(60):
        groups, size, sequences = luck.choice([1, 1, 3, 9]), luck.randint(1, 40), luck.randint(0, 9)
        inputs, dtype = luck.choice([0, 0, 1, 30]), luck.choice([torch.float32, torch.bfloat16])
        block_bytes = luck.randint(1, 64) * 256
        monkeypatch.setenv(BLOCK_BYTES, str(block_bytes))
        weight = torch.zeros(groups, size, size, dtype=dtype)
        w_in = torch.zeros(groups * size, inputs) if inputs else None
        u = torch.zeros(sequences, 1, inputs or groups * size)
        answers.append(
            fits(
                *(groups, size, inputs, sequences, weight.element_size()),
                multiprocessors=BLOCKS,
                block_bytes=block_bytes,
            )
        )
        try:
            forward(inputs=u, weight=weight, input_weight=w_in)
        except RuntimeError as error:
            assert "do not fit into 4 times" in str(error)  # noqa: PT017
            assert not answers[-1]
        else:
            assert answers[-1]
    assert {True, False} <= set(answers)


def on_cuda(*shape: int) -> Tensor:
    return torch.empty(*shape, device="cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 with the CUDA library and Triton, instead of this file's backends."""
    monkeypatch.undo()
    monkeypatch.setattr(extension, "cuda_unavailable_reason", lambda _device: None)
    monkeypatch.setattr(extension, "cuda_memory", lambda _device: (132, 227 * 1024))
    monkeypatch.setattr(available, "unavailable_reason", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))


@pytest.mark.parametrize(
    ("inputs", "weight", "options", "reason"),
    [
        ((2, 9, 1024), (1024, 1024), {}, None),
        ((2, 9, 1024), (16, 64, 64), {}, None),
        ((2, 9, 1024), (1024,), {}, "takes dense and grouped weights"),
        ((2, 9, 1024), (1024, 1024), {"mode": "chunked"}, "goes step after step"),
        ((2, 9, 4096), (4096, 4096), {}, "4096 units in groups of 4096 with 2"),
        ((900, 9, 1024), (1024, 1024), {}, "with 900 sequences do not fit into 132 times"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("gpu")
def test_what_a_gpu_is_told(
    monkeypatch: pytest.MonkeyPatch,
    inputs: tuple[int, ...],
    weight: tuple[int, ...],
    options: dict[str, Any],
    reason: str | None,
) -> None:
    monkeypatch.setattr(available, "unavailable_reason", lambda _device: "it is not installed")
    with FakeTensorMode():
        found = explain(reservoir_scan, on_cuda(*inputs), on_cuda(*weight), **options)
    if reason is None:
        assert found.backend == "native"
        assert found.notes == ["mode='auto' is sequential: its CUDA kernel does not split time"]
    else:
        assert found.backend == "reference"
        assert reason in found.reasons["native"]


@pytest.mark.usefixtures("gpu")
def test_triton_is_preferred_on_a_gpu() -> None:
    with FakeTensorMode():
        u, weight = on_cuda(2, 9, 64), on_cuda(64, 64)
        assert explain(reservoir_scan, u, weight).backend == "triton"
        assert explain(reservoir_scan, u, weight, backend="native").backend == "native"

"""The CUDA kernel of the sequential mode and its launch, run on a CPU as nvcc compiled it, by four
blocks that exchange states: with shared memory for all of W in one block, and with hardly enough in
all four."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resformer_kernels import reservoir_scan
from resformer_kernels.reservoir import api, native, reference
from resformer_kernels.reservoir import op as ops
from resformer_kernels.reservoir.cuda_plan import fits
from resformer_kernels.reservoir.record import ReducedCall
from tests.gpu_on_cpu import cuda_ops
from tests.gpu_on_cpu.cuda_ops import NAMESPACE, CudaOps
from tests.gpu_on_cpu.executor import POLICIES, WHEN, Schedule
from tests.gpu_on_cpu.limits import LIMITS, Limits
from tests.reservoir.cases import Case, cases, check_budget, empty, sweep
from tests.reservoir.checks import BY_KERNELS, check_not_finite, check_refusals, ops_of

BLOCKS, LARGE = 4, 227 * 1024


def limits(block_bytes: int) -> Limits:
    """Of a GPU with BLOCKS multiprocessors, each with memory for one block of so many bytes."""
    return LIMITS[90]._replace(
        multiprocessors=BLOCKS,
        shared_block=block_bytes,
        # Memory is handed out by 128 bytes.
        shared=-(-block_bytes // 128) * 128 + LIMITS[90].shared_reserved,
    )


@dataclasses.dataclass(frozen=True)
class CudaOnCpu:
    """The backend for dense and grouped weights; `tight`: with no more memory than a call needs."""

    NAME: str
    tight: bool
    library: CudaOps

    def unsupported_reason(self, _call: ReducedCall, _hardware: object) -> None:
        return None

    def run(self, call: ReducedCall) -> Any:
        # A backward has it too.
        self.library.gpu.limits = limits(least_bytes(call) if self.tight else LARGE)
        return ops.run(NAMESPACE, call)


def least_bytes(call: ReducedCall) -> int:
    """About the smallest shared memory per block that is enough."""
    needed = 256
    while native.too_large(call.scan, BLOCKS, needed) is not None:
        needed += needed // 8
    return needed


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> CudaOps:
    """The ops' library with a small GPU, and the backends in place of every other one."""
    library = cuda_ops.library("reservoir/reservoir_cuda.cu", ops.OPS)
    library.gpu = cuda_ops.Gpu(limits=limits(LARGE))
    backends = (CudaOnCpu("cuda", False, library), CudaOnCpu("tight", True, library), reference)
    monkeypatch.setattr(api, "BACKENDS", backends)
    return library


by_memory = pytest.mark.parametrize("backend_name", ["cuda", "tight"])


@by_memory
@pytest.mark.parametrize("kind", ["dense", "groups"])
@sweep(15)
@given(data=st.data())
def test_stays_within_budget(
    kind: str, backend_name: str, small: CudaOps, data: st.DataObject
) -> None:
    small.gpu = data.draw(cuda_ops.GPUS)
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


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("policy", POLICIES)
def test_the_bits_are_the_same_whatever_runs_first(policy: str, when: str, small: CudaOps) -> None:
    """Four blocks that wait for one another's states, some far behind."""
    u = torch.randn(3, 5, 33)
    weight, grad = torch.randn(33, 33) / 6, torch.randn(3, 5, 33)

    def run(schedule: Schedule) -> list[Tensor]:
        small.gpu.schedule = schedule
        leaves = [u.detach().requires_grad_(), weight.detach().requires_grad_()]
        states, _ = reservoir_scan(*leaves, leak=0.5, backend="tight")
        found = [states.detach(), *torch.autograd.grad(states, leaves, grad)]
        assert {report.blocks_resident for _, report in small.gpu.reports} == {BLOCKS}
        return found

    expected = run(Schedule())
    for seed in range(3):
        for got, other in zip(run(Schedule(policy, when, seed)), expected, strict=True):
            assert torch.equal(got, other)


def test_blocks_that_are_not_all_there_at_once_are_refused(small: CudaOps) -> None:
    u, weight = torch.randn(8, 3, 33), torch.randn(33, 33) / 6
    small.gpu.limits = limits(8 << 10)
    small.gpu.told = small.gpu.limits._replace(multiprocessors=2 * BLOCKS)
    forward, _ = ops_of(NAMESPACE)
    with pytest.raises(RuntimeError, match="limits: a cooperative grid of 8 blocks, of which 4"):
        forward(inputs=u, weight=weight)


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


def test_memory_is_said_to_do_where_it_does(small: CudaOps) -> None:
    forward, _ = ops_of(NAMESPACE)
    luck = random.Random(3)
    answers = []
    for _ in range(60):
        groups, size, sequences = luck.choice([1, 1, 3, 9]), luck.randint(1, 40), luck.randint(0, 9)
        inputs, dtype = luck.choice([0, 0, 1, 30]), luck.choice([torch.float32, torch.bfloat16])
        block_bytes = luck.randint(1, 64) * 256
        small.gpu.limits = limits(block_bytes)
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

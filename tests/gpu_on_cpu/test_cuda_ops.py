"""Kernels of nvcc that are broken on purpose: their ops tell what is wrong, and where."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from resformer_kernels.mix import op as mix
from resformer_kernels.reservoir import op as reservoir
from resformer_kernels.reservoir.record import ReservoirCall
from tests.gpu_on_cpu import cuda_ops
from tests.gpu_on_cpu.cuda_ops import NAMESPACE, CudaOps
from tests.gpu_on_cpu.executor import Program
from tests.gpu_on_cpu.limits import LIMITS


@pytest.fixture
def mixing(monkeypatch: pytest.MonkeyPatch) -> CudaOps:
    found = cuda_ops.library("mix/mix_cuda.cu", mix.OPS)
    monkeypatch.setattr(found, "programs", {})
    return found


@pytest.fixture
def reservoirs(monkeypatch: pytest.MonkeyPatch) -> CudaOps:
    found = cuda_ops.library("reservoir/reservoir_cuda.cu", reservoir.OPS)
    monkeypatch.setattr(found, "programs", {})
    return found


def edited(found: CudaOps, edit: Callable[[str], str]) -> None:
    """Runs what `edit` makes of the PTX from here on."""
    found.gpu = cuda_ops.Gpu()
    given = found.ptx(90)
    text = edit(given)
    assert text != given
    found.programs[90] = Program(text)


def forward(values: list[Tensor]) -> Tensor:
    ops = getattr(torch.ops, NAMESPACE)
    none = values[0].new_empty(0)
    result: Tensor = ops.mix_values_forward(values, [none] * len(values), [0.5] * len(values))
    return result


def backward(grad: Tensor, value: Tensor, coefficient: Tensor) -> list[Tensor]:
    ops = getattr(torch.ops, NAMESPACE)
    result: list[Tensor] = ops.mix_values_backward(grad, [value], [coefficient], [1.0], [1, 1])
    return result


def scan(found: CudaOps) -> Tensor:
    """33 units in parts of four blocks, of two sequences."""
    small = LIMITS[90]._replace(multiprocessors=4, shared_block=3 << 10, shared=4 << 10)
    found.gpu.limits = small
    u, weight, leak = torch.randn(2, 4, 33), torch.randn(33, 33) / 6, torch.tensor(0.5)
    call = ReservoirCall(u, weight, None, None, None, leak, None, None, 0, 1, 0.0, None)
    states: Tensor = getattr(torch.ops, NAMESPACE).reservoir_scan_forward(*call)[0]
    assert {report.blocks_resident for _, report in found.gpu.reports} == {4}
    return states


def test_a_sum_without_its_barrier_is_a_race(mixing: CudaOps) -> None:
    edited(mixing, lambda ptx: ptx.replace("bar.sync \t0;", ""))
    with pytest.raises(RuntimeError, match=r"race: .*\n(.*\n)*.*mix_cuda.cu"):
        backward(torch.randn(2, 40, 2, 8), torch.randn(2, 40, 2, 8), torch.randn(1, 1, 2, 1))


@pytest.mark.parametrize("number", range(3))
def test_a_step_without_a_barrier_is_a_race(reservoirs: CudaOps, number: int) -> None:
    def without(ptx: str) -> str:
        head, *kernels = re.split(r"(?=\n\.entry)", ptx)
        for i, kernel in enumerate(kernels):
            parts = kernel.split("bar.sync \t0;")
            parts[number : number + 2] = ["".join(parts[number : number + 2])]
            kernels[i] = "bar.sync \t0;".join(parts)
        return "".join([head, *kernels])

    edited(reservoirs, without)
    with pytest.raises(RuntimeError, match="race: "):
        scan(reservoirs)


def test_a_step_that_does_not_await_its_copies_is_a_race(reservoirs: CudaOps) -> None:
    edited(reservoirs, lambda ptx: ptx.replace("cp.async.wait_all;", ""))
    with pytest.raises(RuntimeError, match=r"race: .*\n(.*\n)*.*and .*cp.async.ca.shared.global"):
        scan(reservoirs)


def test_states_that_are_not_sent_are_a_deadlock(reservoirs: CudaOps) -> None:
    edited(reservoirs, lambda ptx: re.sub(r"st\.relaxed\.gpu\.global\.u64.*;", "", ptx))
    with pytest.raises(RuntimeError, match=r"deadlock: .*\n(.*\n)*.*reservoir_cuda.h"):
        scan(reservoirs)


def test_partial_sums_that_nobody_stored_are_unwritten(mixing: CudaOps) -> None:
    edited(mixing, lambda ptx: re.sub(r"st\.global\.f64.*;", "", ptx))
    with pytest.raises(RuntimeError, match=r"unwritten: .* allocation \d of shape \(20\)"):
        backward(torch.randn(2, 40, 2, 8), torch.randn(2, 40, 2, 8), torch.randn(1, 1, 2, 1))


@pytest.mark.parametrize(
    ("instead", "told"),
    [
        (r"st.global.v4.u32 \2, \1;", r"bounds: .* argument 0 of shape \(2, 6, 2, 4\)"),
        (r"ld.global.nc.v4.u32 \1, [\3+16];", "unwritten: .* argument 0"),
        (r"ld.global.nc.v4.u32 \1, [\3+1048576];", "bounds: "),
        (r"ld.global.nc.v4.u32 \1, [\3+4];", "misaligned: "),
    ],
    ids=["written", "between elements", "behind all", "misaligned"],
)
def test_arguments_are_read_where_their_elements_are(
    mixing: CudaOps, instead: str, told: str
) -> None:
    loads = r"ld\.global\.nc\.v4\.u32\s+({[^}]*}),\s*(\[(%rd\d+)\]);"
    edited(mixing, lambda ptx: re.sub(loads, instead, ptx))
    with pytest.raises(RuntimeError, match=told):
        forward([torch.randn(2, 6, 2, 8)[..., :4]])

"""The CUDA kernels of `mix_values` and their launches, run on a CPU as nvcc compiled them: held to
the same budget as every backend, to the bits of the CPU's kernels, and to the rules of a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from resformer_kernels._core import extension
from resformer_kernels._core.hardware import Hardware
from resformer_kernels.mix import api, reference
from resformer_kernels.mix import native as on_cpu
from resformer_kernels.mix import op as ops
from resformer_kernels.mix.record import MixCall
from tests.gpu_on_cpu import cuda_ops
from tests.gpu_on_cpu.cuda_ops import NAMESPACE, CudaOps
from tests.mix.calls import values_calls, wrong_values_calls
from tests.mix.cases import DTYPES, FORMS, Case, cases, check_budget, run, values_call

by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
by_capability = pytest.mark.parametrize("capability", sorted(cuda_ops.ARCHITECTURES))


class CudaOnCpu:
    """The CUDA backend of `mix_values`."""

    NAME = "cuda"

    @staticmethod
    def unsupported_reason(_call: MixCall, _hardware: Hardware) -> None:
        return None

    @staticmethod
    def run(call: MixCall) -> Tensor:
        return ops.run(NAMESPACE, call)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> CudaOps:
    """The ops' library, and the backend in place of every other one."""
    library = cuda_ops.library("mix/mix_cuda.cu", ops.OPS)
    library.gpu = cuda_ops.Gpu()
    monkeypatch.setattr(api, "BACKENDS", (CudaOnCpu, on_cpu, reference))
    return library


@by_dtype
@settings(max_examples=25)
@given(data=st.data())
def test_values_stay_within_budget(dtype: torch.dtype, gpu: CudaOps, data: st.DataObject) -> None:
    gpu.gpu = data.draw(cuda_ops.GPUS)
    check_budget(values_call, data.draw(cases(dtype)), "cuda")


@by_dtype
@pytest.mark.parametrize("rows", [(3, 300), (900,), (700, 1)], ids=str)
def test_long_sums_stay_within_budget(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    forms = tuple(form for form in FORMS if form not in ("float", "full"))
    check_budget(values_call, Case(rows, 4, 48, dtype, forms), "cuda")


@by_dtype
@by_capability
@pytest.mark.parametrize("layout", ["contiguous", "heads_first", "sliced"])
@pytest.mark.parametrize("dim", [16, 17])
def test_rows_of_whole_vectors_and_others(
    dtype: torch.dtype, capability: int, layout: str, dim: int, gpu: CudaOps
) -> None:
    gpu.gpu.capability = capability
    case = Case((2, 9), 3, dim, dtype, FORMS, layout=layout, grad_layout=layout)
    check_budget(values_call, case, "cuda")


@by_dtype
@by_capability
@pytest.mark.parametrize(("count", "dim"), [(9, 16), (30, 17)])
def test_more_sources_than_fit_into_a_launch(
    dtype: torch.dtype, capability: int, count: int, dim: int, gpu: CudaOps
) -> None:
    gpu.gpu.capability = capability
    forms = (("float", "scalar", "head", "full", "dim") * 6)[:count]
    check_budget(values_call, Case((2, 9), 3, dim, dtype, forms), "cuda")


@pytest.mark.parametrize("rows", [(0, 5), (3, 0), (0,)], ids=str)
def test_empty(rows: tuple[int, ...]) -> None:
    forms = ("float", "scalar", "head", "token", "full")
    check_budget(values_call, Case(rows, 2, 8, torch.float32, forms), "cuda")


@by_dtype
@by_capability
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("dim", [40, 7])
def test_the_bits_are_those_of_the_cpu(
    dtype: torch.dtype, capability: int, dim: int, gpu: CudaOps
) -> None:
    gpu.gpu.capability = capability
    if "avx2" not in extension.available_cpu_paths():
        pytest.skip("this machine's CPU path does not fuse multiply and add")
    case = Case((2, 23), 3, dim, dtype, ("full", "head", "float", "token", "full"))
    found = []
    for backend in ("cuda", "native"):
        call = values_call(case, backend)
        out, *gradients = run(call, call.leaves, call.grad)
        found.append([out, *gradients[:5], gradients[5], gradients[8]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_opcheck() -> None:
    for op, arguments in values_calls(getattr(torch.ops, NAMESPACE)):
        torch.library.opcheck(op.default, arguments)


def test_the_op_itself_checks_its_arguments() -> None:
    for op, arguments in wrong_values_calls(getattr(torch.ops, NAMESPACE)):
        with pytest.raises(RuntimeError):
            op(*arguments)

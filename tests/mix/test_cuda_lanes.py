"""The CUDA kernels of `mix_values`, run lane by lane on a CPU: their arithmetic, their cut of the
work and their order of sums, held to the same budget as every backend. Launches need a GPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from build_support import native
from resformer_kernels.mix import api, ops, reference
from resformer_kernels.mix.autograd import run_op
from resformer_kernels.mix.call import MixCall
from tests.mix.cases import DTYPES, FORMS, Case, cases, check_budget, run, values_call

NAMESPACE = "resformer_lanes"
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


class Operand(ctypes.Structure):
    """A tensor as the program takes it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
        ("stride", ctypes.c_int64 * 4),
        ("number", ctypes.c_double),
    )


def present(x: Tensor) -> bool:
    return not (x.dim() == 1 and x.numel() == 0)


def operand(x: Tensor, dtype: torch.dtype, number: float = 1.0) -> Operand:
    if not present(x):
        return Operand(None, CODES[dtype], (ctypes.c_int64 * 4)(), number)
    x = x[None] if x.dim() == 3 else x
    strides = [0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True)]
    return Operand(x.data_ptr(), CODES[x.dtype], (ctypes.c_int64 * 4)(*strides), number)


class Lanes:
    """A backend whose ops are the program's."""

    NAME = "lanes"

    def __init__(self, program: ctypes.CDLL) -> None:
        self.program = program
        self.vectors: set[bool] = set()
        """Whether 16 bytes were moved at once, of the calls so far."""
        self.library = ops.define(NAMESPACE)
        self.library.impl("mix_values_forward", self.forward, "CPU")
        self.library.impl("mix_values_backward", self.backward, "CPU")

    @staticmethod
    def unsupported_reason(_call: MixCall) -> None:
        return None

    @staticmethod
    def run(call: MixCall) -> Tensor:
        return run_op(call, NAMESPACE)

    def forward(
        self, values: list[Tensor], coefficients: list[Tensor], numbers: list[float]
    ) -> Tensor:
        out = torch.empty_like(values[0], memory_format=torch.contiguous_format)
        if out.numel() == 0:
            return out
        dtype, count = out.dtype, len(values)
        pairs = zip(coefficients, numbers, strict=True)
        moved = self.program.mix_forward(
            shape_of(out),
            ctypes.c_int64(CODES[dtype]),
            ctypes.c_int64(count),
            (Operand * count)(*(operand(x, dtype) for x in values)),
            (Operand * count)(*(operand(c, dtype, number) for c, number in pairs)),
            ctypes.c_void_p(out.data_ptr()),
        )
        self.vectors.add(bool(moved))
        return out

    def backward(
        self,
        grad: Tensor,
        values: list[Tensor],
        coefficients: list[Tensor],
        numbers: list[float],
        mask: list[int],
    ) -> list[Tensor]:
        count = len(values)
        leaves = [*[grad] * count, *coefficients]
        results = [
            torch.full(leaf.shape if wanted else (0,), torch.nan, dtype=leaf.dtype)
            for leaf, wanted in zip(leaves, mask, strict=True)
        ]
        for i in range(count):
            if grad.numel() == 0:
                results[count + i].zero_()
            elif mask[i] or mask[count + i]:
                c = operand(coefficients[i], grad.dtype, numbers[i])
                self.one(grad, values[i], c, results[i], results[count + i])
        return results

    def one(self, grad: Tensor, value: Tensor, c: Operand, dv: Tensor, dc: Tensor) -> None:
        wanted = dc.numel() > 0
        axes = [1, *dc.shape][-4:] if wanted else [1] * 4
        kept = sum(1 << axis for axis, size in enumerate(axes) if size > 1)
        partials = torch.full((grad.numel(),), torch.nan, dtype=torch.float64)
        moved = self.program.mix_backward(
            shape_of(grad),
            ctypes.c_int64(CODES[grad.dtype]),
            ctypes.byref(operand(grad, grad.dtype)),
            ctypes.byref(operand(value, grad.dtype)),
            ctypes.byref(c),
            ctypes.c_void_p(dv.data_ptr() if dv.numel() else None),
            ctypes.c_void_p(dc.data_ptr() if wanted else None),
            ctypes.c_int64(CODES[dc.dtype]),
            ctypes.c_int64(kept),
            ctypes.c_void_p(partials.data_ptr()),
        )
        self.vectors.add(bool(moved))


def shape_of(x: Tensor) -> Any:
    return (ctypes.c_int64 * 4)(*[1, *x.shape][-4:])


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not here")
    built = tmp_path_factory.mktemp("lanes") / "lanes.so"
    source = Path(__file__).with_name("lanes_on_cpu.cpp")
    flags = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    command = [compiler, *flags, f"-I{native.ROOT / 'csrc'}", str(source), "-o", str(built)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(built))


@pytest.fixture
def lanes(program: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lanes]:
    backend = Lanes(program)
    monkeypatch.setattr(api, "BACKENDS", (backend, reference))
    yield backend
    backend.library._destroy()


@by_dtype
@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
@pytest.mark.usefixtures("lanes")
def test_values_stay_within_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    check_budget(values_call, data.draw(cases(dtype)), "lanes")


@by_dtype
@pytest.mark.usefixtures("lanes")
@pytest.mark.parametrize("rows", [(3, 300), (900,), (700, 1)], ids=str)
def test_long_sums_stay_within_budget(dtype: torch.dtype, rows: tuple[int, ...]) -> None:
    forms = tuple(form for form in FORMS if form not in ("float", "full"))
    check_budget(values_call, Case(rows, 4, 48, dtype, forms), "lanes")


@by_dtype
def test_rows_of_whole_vectors_are_moved_16_bytes_at_once(dtype: torch.dtype, lanes: Lanes) -> None:
    for layout in ("contiguous", "heads_first"):
        check_budget(values_call, Case((2, 9), 3, 16, dtype, FORMS, layout=layout), "lanes")
    assert lanes.vectors == {True}
    check_budget(values_call, Case((2, 9), 3, 17, dtype, ("full",), layout="heads_first"), "lanes")
    check_budget(values_call, Case((2, 9), 3, 16, dtype, ("full",), layout="sliced"), "lanes")
    assert lanes.vectors == {True, False}


@by_dtype
@pytest.mark.usefixtures("lanes", "native")
@pytest.mark.parametrize("dim", [40, 7])
def test_the_bits_are_those_of_the_cpu(
    dtype: torch.dtype, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resformer_kernels import _extension
    from resformer_kernels.mix import native as on_cpu

    if "avx2" not in _extension.available_cpu_paths():
        pytest.skip("this machine's CPU path does not fuse multiply and add")
    monkeypatch.setattr(api, "BACKENDS", (*api.BACKENDS, on_cpu))
    case = Case((2, 23), 3, dim, dtype, ("full", "head", "float", "token", "full"))
    found = []
    for backend in ("lanes", "native"):
        call = values_call(case, backend)
        out, *gradients = run(call, call.leaves, call.grad)
        dv, dfull = gradients[:5], [gradients[5], gradients[8]]
        found.append([out, *dv, *dfull])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

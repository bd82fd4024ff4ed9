"""The launches whose kernels `resformer-kernels compile-check` compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resformer_kernels._triton.arch import is_amd
from resformer_kernels._triton.cases import CompileCase, case_from_launch
from resformer_kernels._triton.launch import assumed_capability, recorded_launches
from resformer_kernels.reservoir.record import (
    CHUNKED,
    MODES,
    SEQUENTIAL,
    TANH,
    AdjointCall,
    ReservoirCall,
)
from resformer_kernels.reservoir.triton import recurrence

_TIME, _UNITS, _ENTRIES = 16384, 1024, 102400
# Weight, its dtype, mode. Groups and packed sequences are the same kernel; a batch only has more
# rows.
_FORMS = (
    ("dense", torch.float32, CHUNKED),
    ("dense", torch.bfloat16, CHUNKED),
    ("dense", torch.float32, SEQUENTIAL),
    ("csr", torch.float32, CHUNKED),
    ("ring", torch.float32, SEQUENTIAL),
)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if kind == "csr":
        columns = _meta(_ENTRIES, dtype=torch.int64)
        return _meta(_ENTRIES, dtype=dtype), _meta(_UNITS + 1, dtype=torch.int64), columns
    if kind == "ring":
        return _meta(_UNITS, dtype=dtype), None, _meta(_UNITS, dtype=torch.int64)
    return _meta(_UNITS, _UNITS, dtype=dtype), None, None


def _launch(kind: str, dtype: torch.dtype, mode: int) -> None:
    weight = _weight(kind, dtype)
    inputs, projection, grad = _meta(1, _TIME, 1), _meta(_UNITS, 1), _meta(1, _TIME, _UNITS)
    vector, state, largest = _meta(_UNITS), _meta(1, _UNITS), _meta(dtype=torch.float64)
    recurrence.forward(
        ReservoirCall(inputs, *weight, projection, vector, vector, state, TANH, mode, 3e-6, None)
    )
    recurrence.adjoint(AdjointCall(grad, grad, *weight, vector, mode, largest, None))


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Each form of the weight, and the adjoint of the first; none of them may spill.

    None for AMD: Triton's compiler ends with an error at a choice between two pointers there.
    """
    if is_amd(divmod(capability, 10)):
        return
    for kind, dtype, mode in _FORMS:
        with assumed_capability(divmod(capability, 10)), recorded_launches() as launches:
            _launch(kind, dtype, mode)
        parts = ("forward", "adjoint") if (kind, dtype, mode) == _FORMS[0] else ("forward",)
        for launch, part in zip(launches, parts, strict=False):
            name = f"{part} {kind} {MODES[mode]} {str(dtype).removeprefix('torch.')}"
            yield case_from_launch(name, launch, capability=capability, main=True)

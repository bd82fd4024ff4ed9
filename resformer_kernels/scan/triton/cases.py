"""The launches whose kernels `resformer-kernels compile-check` compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from resformer_kernels._triton.cases import CompileCase, case_from_launch
from resformer_kernels._triton.launch import assumed_capability, recorded_launches
from resformer_kernels.scan.op import WANTS_GATES, WANTS_INITIAL, WANTS_TOKENS, BackwardCall
from resformer_kernels.scan.record import ScanCall, state_dtype
from resformer_kernels.scan.triton.backward import backward
from resformer_kernels.scan.triton.forward import forward

_TIME, _CHANNELS = 16384, 1024
_WANTED = WANTS_TOKENS | WANTS_GATES | WANTS_INITIAL


class _Form(NamedTuple):
    constant: bool = False
    packed: bool = False
    reverse: bool = False
    batch: int = 4
    """Few enough sequences that time is split."""


_FORMS = {
    "": _Form(),
    " constant": _Form(constant=True),
    " packed": _Form(packed=True, reverse=True),
    " whole": _Form(batch=16),
}
"""By the suffix of a case's name."""


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launch(dtype: torch.dtype, form: _Form) -> None:
    rows = (form.batch * _TIME,) if form.packed else (form.batch, _TIME)
    tokens = _meta(*rows, _CHANNELS, dtype=dtype)
    gates = _meta(_CHANNELS, dtype=dtype) if form.constant else tokens
    cu_seqlens = _meta(form.batch + 1, dtype=torch.int32) if form.packed else None
    state = _meta(form.batch, _CHANNELS, dtype=state_dtype(dtype))
    forward(ScanCall(gates, tokens, state, form.reverse, cu_seqlens))
    backward(BackwardCall(tokens, state, gates, tokens, state, form.reverse, cu_seqlens, _WANTED))


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every kernel for each form of gates; none of them may spill."""
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        for suffix, form in _FORMS.items():
            if suffix and dtype is torch.bfloat16:
                continue
            with assumed_capability(divmod(capability, 10)), recorded_launches() as launches:
                _launch(dtype, form)
            for launch in launches:
                kernel = launch.kernel.fn.__name__.removesuffix("_kernel")
                name = f"{kernel} {str(dtype).removeprefix('torch.')}{suffix}"
                yield case_from_launch(name, launch, capability=capability, main=True)

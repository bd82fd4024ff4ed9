"""The launches whose kernels `resformer-kernels compile-check` compiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from resformer_kernels._triton.cases import CompileCase, case_from_launch
from resformer_kernels._triton.launch import recorded_launches
from resformer_kernels.scan.op import WANTS_GATES, WANTS_INITIAL, WANTS_TOKENS, BackwardCall
from resformer_kernels.scan.record import ScanCall, state_dtype
from resformer_kernels.scan.triton.backward import backward
from resformer_kernels.scan.triton.forward import forward

_BATCH, _TIME, _CHANNELS = 4, 16384, 1024
_WANTED = WANTS_TOKENS | WANTS_GATES | WANTS_INITIAL
# (constant gates, packed, reversed) by the suffix of a case's name.
_FORMS: dict[str, tuple[bool, bool, bool]] = {
    "": (False, False, False),
    " constant": (True, False, False),
    " packed": (False, True, True),
}


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _launch(dtype: torch.dtype, constant: bool, packed: bool, reverse: bool) -> None:
    rows = (_BATCH * _TIME,) if packed else (_BATCH, _TIME)
    tokens = _meta(*rows, _CHANNELS, dtype=dtype)
    gates = _meta(_CHANNELS, dtype=dtype) if constant else tokens
    cu_seqlens = _meta(_BATCH + 1, dtype=torch.int32) if packed else None
    state = _meta(_BATCH, _CHANNELS, dtype=state_dtype(dtype))
    forward(ScanCall(gates, tokens, state, reverse, cu_seqlens))
    backward(BackwardCall(tokens, state, gates, tokens, state, reverse, cu_seqlens, _WANTED))


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every kernel for each form of gates; none of them may spill."""
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        for form, flags in _FORMS.items():
            if form and dtype is torch.bfloat16:
                continue
            with recorded_launches() as launches:
                _launch(dtype, *flags)
            part = "forward"
            for launch in launches:
                kernel = launch.kernel.fn.__name__.removesuffix("_kernel")
                name = f"{kernel} {str(dtype).removeprefix('torch.')}{form}"
                if kernel == "summary":
                    name = f"{part}: {name}"
                if kernel == "forward":
                    part = "backward"
                if kernel != "carry" or part == "forward":
                    yield case_from_launch(name, launch, capability=capability, main=True)

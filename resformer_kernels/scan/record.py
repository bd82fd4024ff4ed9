"""The record of a scan, and the checks that lead to it."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core import strides
from resformer_kernels._core.checks import check_cu_seqlens, check_flag, check_tensor
from resformer_kernels._core.op import refuse_vmap

SCAN = "linear_scan"

_NARROW = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, *_NARROW, torch.complex64)
DTYPES = (*KERNEL_DTYPES, torch.float64, torch.complex128)
_FIXED = "(batch, time, channels)"
_PACKED = "(total_tokens, channels) with cu_seqlens"


class ScanCall(NamedTuple):
    """h_t = gates_t * h_{t-1} + tokens_t; the fields are the op's arguments in order.

    tokens (B, T, N), or packed (total, N) with cu_seqlens (S + 1,); gates of their shape, or (N,);
    initial_state (B, N) or (S, N), or None: zeros.
    """

    gates: Tensor
    tokens: Tensor
    initial_state: Tensor | None
    reverse: bool
    cu_seqlens: Tensor | None

    @property
    def sequences(self) -> int:
        """Number of sequences: the rows of a state."""
        return sequences_of(self.tokens, self.cu_seqlens)


TENSORS = ("gates", "tokens", "initial_state", "cu_seqlens")

copy_notes = partial(strides.copy_notes, names=TENSORS)
"""Says which arguments are copied before the kernel, for `explain`."""


def sequences_of(tokens: Tensor, cu_seqlens: Tensor | None) -> int:
    """Number of sequences in tokens, or in packed ones."""
    return tokens.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tokens of `dtype` are accumulated and their final state is returned."""
    return torch.float32 if dtype in _NARROW else dtype


def dtype_reason(call: ScanCall) -> str | None:
    """Why kernels cannot serve the call's dtype; None when they can."""
    if call.tokens.dtype not in KERNEL_DTYPES:
        return f"it serves float32, bfloat16, float16 and complex64, these are {call.tokens.dtype}"
    return None


def check_call(
    gates: Any, tokens: Any, initial_state: Any, reverse: Any, cu_seqlens: Any
) -> ScanCall:
    """The arguments of `linear_scan`, checked and normalised."""
    refuse_vmap(SCAN, (gates, tokens, initial_state, cu_seqlens))
    if cu_seqlens is None:
        check_tensor("tokens", tokens, 3, f"{_FIXED}, or {_PACKED}")
    else:
        check_tensor("tokens", tokens, 2, _PACKED)
    check_flag("reverse", reverse)
    _check_dtype("tokens", tokens)
    _check_gates(gates, tokens)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "tokens", tokens, "the {} tokens")
    call = ScanCall(gates, tokens, initial_state, reverse, cu_seqlens)
    if initial_state is not None:
        _check_initial(initial_state, call)
    return _promoted(call)


def _promoted(call: ScanCall) -> ScanCall:
    """The call in one dtype, torch's promotion of all; float32 stays as it is beside 16 bits."""
    others = [x for x in (call.gates, call.initial_state) if x is not None]
    dtype = call.tokens.dtype
    for x in others:
        if x.dtype is not state_dtype(dtype):
            dtype = torch.promote_types(dtype, x.dtype)
    kept = (dtype, state_dtype(dtype))
    gates, initial_state = (
        x if x is None or x.dtype in kept else x.to(dtype) for x in (call.gates, call.initial_state)
    )
    assert gates is not None
    tokens = call.tokens.to(dtype)
    return call._replace(gates=gates, tokens=tokens, initial_state=initial_state)


def _check_dtype(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f"{name} must be float32, bfloat16, float16, complex64, float64 or complex128, "
            f"got {tensor.dtype}"
        )


def _check_dtype_and_device(name: str, tensor: Tensor, tokens: Tensor) -> None:
    _check_dtype(name, tensor)
    if tensor.device != tokens.device:
        raise ValueError(f"{name} must be on tokens' device {tokens.device}, got {tensor.device}")


def _check_gates(gates: Any, tokens: Tensor) -> None:
    channels = tokens.shape[-1]
    expected = f"tokens' shape {tuple(tokens.shape)}, or ({channels},) for gates constant in time"
    check_tensor("gates", gates, (1, tokens.dim()), f"of {expected}")
    if gates.shape != tokens.shape and (gates.dim() != 1 or gates.shape[0] != channels):
        raise ValueError(f"gates must have {expected}, got shape {tuple(gates.shape)}")
    _check_dtype_and_device("gates", gates, tokens)


def _check_initial(initial_state: Any, call: ScanCall) -> None:
    check_tensor("initial_state", initial_state, 2, "(sequences, channels)")
    shape = (call.sequences, call.tokens.shape[-1])
    if tuple(initial_state.shape) != shape:
        raise ValueError(
            f"initial_state must have one row a sequence, {shape}, "
            f"got shape {tuple(initial_state.shape)}"
        )
    _check_dtype_and_device("initial_state", initial_state, call.tokens)

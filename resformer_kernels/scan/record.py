"""The normalised form of a scan, and every check that leads to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from resformer_kernels._core.checks import check_cu_seqlens, check_flag, check_tensor
from resformer_kernels._core.old import vmap_error
from resformer_kernels.scan.op import SCAN, state_dtype

DTYPES = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.complex64),
    *(torch.float64, torch.complex128),
)
_FIXED = "(batch, time, channels)"
_PACKED = "(total_tokens, channels) with cu_seqlens"


class ScanCall(NamedTuple):
    """h_t = gates_t * h_{t-1} + tokens_t.

    tokens (B, T, N), or packed (total, N) with cu_seqlens (S + 1,); gates of their shape, or (N,);
    initial_state (B, N) or (S, N), or None: zeros.
    """

    gates: Tensor
    tokens: Tensor
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    reverse: bool

    @property
    def sequences(self) -> int:
        """How many: the rows of a state."""
        if self.cu_seqlens is None:
            return self.tokens.shape[0]
        return self.cu_seqlens.shape[0] - 1


def check_scan(
    gates: Any, tokens: Any, initial_state: Any, reverse: Any, cu_seqlens: Any
) -> ScanCall:
    """Check and normalise the arguments of `linear_scan`."""
    _refuse_vmap((gates, tokens, initial_state, cu_seqlens))
    if cu_seqlens is None:
        check_tensor("tokens", tokens, 3, f"{_FIXED}, or {_PACKED}")
    else:
        check_tensor("tokens", tokens, 2, _PACKED)
    if tokens.dtype not in DTYPES:
        raise TypeError(
            "tokens must be float32, bfloat16, float16, complex64, float64 or complex128, "
            f"got {tokens.dtype}"
        )
    check_flag("reverse", reverse)
    _check_gates(gates, tokens)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, "tokens", tokens, "the {} tokens")
    call = ScanCall(gates, tokens, initial_state, cu_seqlens, reverse)
    if initial_state is not None:
        _check_initial(call)
    return call


def _refuse_vmap(tensors: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling():
        return
    if any(isinstance(x, Tensor) and torch._C._functorch.is_batchedtensor(x) for x in tensors):
        raise RuntimeError(vmap_error(SCAN))


def _check_dtype_and_device(name: str, tensor: Tensor, tokens: Tensor) -> None:
    if tensor.dtype not in (tokens.dtype, state_dtype(tokens.dtype)):
        wide = state_dtype(tokens.dtype)
        other = "" if wide is tokens.dtype else f" or be {wide}"
        raise TypeError(f"{name} must have tokens' dtype {tokens.dtype}{other}, got {tensor.dtype}")
    if tensor.device != tokens.device:
        raise ValueError(f"{name} must be on tokens' device {tokens.device}, got {tensor.device}")


def _check_gates(gates: Any, tokens: Tensor) -> None:
    channels = tokens.shape[-1]
    wanted = f"tokens' shape {tuple(tokens.shape)}, or ({channels},) for gates that no time changes"
    if not isinstance(gates, Tensor) or gates.layout is not torch.strided:
        check_tensor("gates", gates, tokens.dim(), f"of {wanted}")
    if gates.shape != tokens.shape and (gates.dim() != 1 or gates.shape[0] != channels):
        raise ValueError(f"gates must have {wanted}, got shape {tuple(gates.shape)}")
    _check_dtype_and_device("gates", gates, tokens)


def _check_initial(call: ScanCall) -> None:
    tokens, initial_state = call.tokens, call.initial_state
    check_tensor("initial_state", initial_state, 2, "(sequences, channels)")
    assert initial_state is not None
    shape = (call.sequences, tokens.shape[-1])
    if tuple(initial_state.shape) != shape:
        raise ValueError(
            f"initial_state must have one row a sequence, {shape}, "
            f"got shape {tuple(initial_state.shape)}"
        )
    _check_dtype_and_device("initial_state", initial_state, tokens)

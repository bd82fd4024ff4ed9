"""The launches whose kernels `resformer-kernels compile-check` compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from resformer_kernels._triton.cases import CompileCase, case_from_launch
from resformer_kernels._triton.launch import recorded_launches
from resformer_kernels.mix import op
from resformer_kernels.mix.record import EmbeddingCall, MixCall
from resformer_kernels.mix.triton.backward import mix_values_backward
from resformer_kernels.mix.triton.forward import mix_value_embedding_forward, mix_values_forward
from resformer_kernels.mix.triton.scatter import mix_value_embedding_backward

_TIME, _HEADS, _DIM, _VOCAB = 4096, 16, 64, 32768
_NONE = (0,)
_FORMS = {
    "scalar": (1, 1, 1, 1),
    "head": (1, 1, _HEADS, 1),
    "channel": (1, 1, _HEADS, _DIM),
    "token_head": (1, _TIME, _HEADS, 1),
    "full": (1, _TIME, _HEADS, _DIM),
}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _values(dtype: torch.dtype, count: int, dim: int) -> tuple[Tensor, ...]:
    return tuple(_meta(1, _TIME, _HEADS, dim, dtype=dtype) for _ in range(count))


def _call(dtype: torch.dtype, count: int, form: tuple[int, ...], dim: int) -> MixCall:
    return MixCall(_values(dtype, count, dim), (_meta(*form),) * count, (0.5,) * count)


def _forward(dtype: torch.dtype, count: int, form: tuple[int, ...], dim: int = _DIM) -> None:
    mix_values_forward(_call(dtype, count, form, dim))


def _backward(dtype: torch.dtype, count: int, form: tuple[int, ...], dim: int = _DIM) -> None:
    (grad,) = _values(dtype, 1, dim)
    mask = (1,) * count + (int(form != _NONE),) * count
    mix_values_backward(op.MixBackwardCall(grad, _call(dtype, count, form, dim), mask))


def _embedding(dtype: torch.dtype, table: torch.dtype, backward: bool) -> None:
    (v,) = _values(dtype, 1, _DIM)
    rows = _meta(_VOCAB, _HEADS, _DIM, dtype=table)
    ids, gate = _meta(1, _TIME, dtype=torch.int64), _meta(1, _TIME, _HEADS, 1)
    if backward:
        mask = op.WANTS_TABLE | op.WANTS_GATE
        call = op.EmbeddingBackwardCall(v, rows, ids, gate, 1.0)
        mix_value_embedding_backward(op.DenseBackwardCall(call, mask))
    else:
        mix_value_embedding_forward(EmbeddingCall(v, rows, ids, gate, 1.0, False))


def _launches(bf16: torch.dtype, f32: torch.dtype) -> Iterator[tuple[str, Callable[[], None]]]:
    yield "forward 2 numbers", lambda: _forward(bf16, 2, _NONE)
    yield "forward 2 head", lambda: _forward(bf16, 2, _FORMS["head"])
    yield "forward 2 token_head", lambda: _forward(bf16, 2, _FORMS["token_head"])
    yield "forward 2 full float32", lambda: _forward(f32, 2, _FORMS["full"])
    yield "forward 2 head D100", lambda: _forward(bf16, 2, _FORMS["head"], 100)
    yield "forward 32 scalar", lambda: _forward(bf16, 32, _FORMS["scalar"])
    yield "backward 2 numbers", lambda: _backward(bf16, 2, _NONE)
    for name, form in _FORMS.items():
        yield f"backward 2 {name}", functools.partial(_backward, bf16, 2, form)
    yield "backward 2 head float32", lambda: _backward(f32, 2, _FORMS["head"])
    yield "embedding forward", lambda: _embedding(bf16, bf16, False)
    yield "embedding forward float32 table", lambda: _embedding(bf16, f32, False)
    yield "embedding backward float32 table", lambda: _embedding(bf16, f32, True)


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """Every kernel for each form of coefficients; none of them may spill."""
    for name, launcher in _launches(torch.bfloat16, torch.float32):
        with recorded_launches() as launches:
            launcher()
        for launch in launches:
            kernel = launch.kernel.fn.__name__.removesuffix("_kernel")
            where = name if len(launches) == 1 else f"{name}: {kernel}"
            yield case_from_launch(where, launch, capability=capability, main=True)

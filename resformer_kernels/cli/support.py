"""Calls that each backend of each op serves, according to the backends themselves.

Every answer comes from `unsupported_reason`, by which `backend="auto"` chooses, for small calls
that want gradients of everything. It does not depend on the machine: the native libraries, Triton,
FlashAttention and a GPU of compute capability 9.0 count as present, and no kernel runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from resformer_kernels import (
    RingWeight,
    attention_with_kvcache,
    linear_scan,
    mix_value_embedding,
    mix_values,
    reservoir_scan,
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels._core.hardware import Hardware
from resformer_kernels._core.select import prepare
from resformer_kernels._triton import arch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)
_MEMORY = (arch.STAND_IN_MULTIPROCESSORS, arch.architecture(arch.STAND_IN).shared_bytes)
"""Multiprocessors, and bytes of shared memory of a block."""
_B, _T, _H, _D, _UNITS = 2, 8, 2, 64, 32

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """Whether one backend serves one form of a call."""

    op: str
    feature: str
    backend: str
    device: str
    dtype: str
    reason: str | None
    """Reason why it does not; None where it does."""


class _Make:
    """Makes tensors of one dtype that want gradients."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.real = dtype if not dtype.is_complex else torch.float32

    def leaf(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype).requires_grad_()

    def lengths(self, total: int) -> Tensor:
        return torch.tensor([0, total // 2, total], dtype=torch.int32)


def _attention(make: _Make, heads: int = _H, dim: int = _D, wider: int = 1, **change: Any) -> Call:
    v, v_first = (make.leaf(_B, _T, heads, wider * dim) for _ in range(2))
    rows = (make.leaf(_B, _T, _H, dim), make.leaf(_B, _T, heads, dim))
    return value_residual_attention, rows, {"v": v, "v_first": v_first, **change}


def _packed(make: _Make) -> Call:
    rows = [make.leaf(_B * _T, _H, _D) for _ in range(4)]
    starts = make.lengths(_B * _T)
    named = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "max_seqlen_q": _T, "max_seqlen_k": _T}
    return value_residual_attention_varlen, tuple(rows), named


def _decode(
    make: _Make,
    stored: torch.dtype | None = None,
    time: int = 1,
    appends: int = 2,
    **change: Any,
) -> Call:
    shape = (4, 4, _H, _D) if "block_table" in change else (_B, _T, _H, _D)
    q = torch.zeros(_B, time, 2 * _H, _D, dtype=make.dtype)
    new = [torch.zeros(_B, time, _H, _D, dtype=make.dtype) for _ in range(appends)]
    caches = [torch.zeros(shape, dtype=stored or make.dtype) for _ in range(2)]
    if stored is not None:
        change |= {name: torch.zeros(shape[:3]) for name in ("k_scale", "v_scale")}
    change["cache_seqlens"] = torch.ones(_B, dtype=torch.int32)
    return attention_with_kvcache, (q, *caches, *new), change


def _decode_packed(make: _Make) -> Call:
    function, (q, *caches, k, v), named = _decode(make, time=2)
    named |= {"cu_seqlens_q": make.lengths(2 * _B), "max_seqlen_q": 2}
    named["cu_seqlens_k_new"] = named["cu_seqlens_q"]
    return function, (q.flatten(0, 1), *caches, k.flatten(0, 1), v.flatten(0, 1)), named


def _mix(make: _Make, count: int, *shape: int) -> Call:
    values = [make.leaf(_B, _T, _H, _D) for _ in range(count)]
    coefficients = [make.leaf(*shape, dtype=make.real) for _ in range(count)]
    return mix_values, (values, coefficients), {}


def _embedding(make: _Make, **change: Any) -> Call:
    ids = torch.zeros((_B, _T), dtype=torch.int64)
    v, table = make.leaf(_B, _T, _H, _D), make.leaf(5, _H, _D)
    return mix_value_embedding, (v, table, ids, make.leaf(_B, _T, _H, 1)), change


def _scan(make: _Make, *gates: int, **change: Any) -> Call:
    rows = (_B * _T, _D) if "cu_seqlens" in change else (_B, _T, _D)
    return linear_scan, (make.leaf(*(gates or rows)), make.leaf(*rows)), change


def _reservoir(
    make: _Make,
    weight: str = "dense",
    inputs: int = 0,
    stored: torch.dtype | None = None,
    **change: Any,
) -> Call:
    dtype = torch.promote_types(make.dtype, torch.float32)
    given: Any = {
        "dense": lambda: make.leaf(_UNITS, _UNITS, dtype=stored or dtype),
        "groups": lambda: make.leaf(4, _UNITS // 4, _UNITS // 4, dtype=dtype),
        "diagonal": lambda: make.leaf(_UNITS, dtype=dtype),
        "ring": lambda: RingWeight(make.leaf(_UNITS, dtype=dtype)),
        "csr": lambda: _sparse(torch.eye(_UNITS, dtype=dtype)),
    }[weight]()
    rows = (_B * _T,) if "cu_seqlens" in change else (_B, _T)
    if inputs:
        change["input_weight"] = make.leaf(_UNITS, inputs, dtype=dtype)
    if change.get("reduce") == "gram":
        change["targets"] = torch.zeros(*rows, 1, dtype=make.dtype)
    drive = make.leaf(*rows, inputs or _UNITS)
    return reservoir_scan, (drive, given), change


def _sparse(dense: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        return dense.to_sparse_csr()


FEATURES: dict[str, dict[str, Callable[[_Make], Call]]] = {
    "value_residual_attention": {
        "V' of two sources": _attention,
        "first layer's values alone": lambda m: _attention(m, v=None),
        "plain attention": lambda m: _attention(m, v_first=None),
        "learned scalars": lambda m: _attention(m, lambda_v=m.leaf(), lambda_first=m.leaf()),
        "a coefficient per element": lambda m: _attention(m, lambda_first=m.leaf(_B, _T, _H, _D)),
        "grouped-query heads": lambda m: _attention(m, heads=1),
        "causal": lambda m: _attention(m, causal=True),
        "window": lambda m: _attention(m, window=(3, 0)),
        "negative scale": lambda m: _attention(m, scale=-1.0),
        "softcap": lambda m: _attention(m, softcap=30.0),
        "sinks": lambda m: _attention(m, sinks=m.leaf(_H)),
        "exclusive outputs": lambda m: _attention(m, exclusive=m.leaf(_B, _T, _H, 1)),
        "gate on the output": lambda m: _attention(m, out_gate=m.leaf(_B, _T, _H, _D)),
        "bool mask": lambda m: _attention(m, attn_bias=torch.ones(_T, _T).bool()),
        "additive bias": lambda m: _attention(m, attn_bias=m.leaf(_B, _H, _T, _T)),
        "values wider than keys": lambda m: _attention(m, wider=2),
        "head_dim 512": lambda m: _attention(m, dim=512),
        "LSE and its gradient": lambda m: _attention(m, return_lse=True),
        "V' returned": lambda m: _attention(m, return_mixed_value=True),
        "packed sequences": _packed,
    },
    "attention_with_kvcache": {
        "contiguous": _decode,
        "paged": lambda m: _decode(m, block_table=torch.zeros(_B, 2).int()),
        "int8 cache": lambda m: _decode(m, torch.int8),
        "float8 cache": lambda m: _decode(m, torch.float8_e4m3fn),
        "K appended alone": lambda m: _decode(m, appends=1),
        "nothing appended": lambda m: _decode(m, appends=0),
        "several queries": lambda m: _decode(m, time=3),
        "packed queries and new tokens": _decode_packed,
        "V's own block table": lambda m: _decode(
            m, block_table=torch.zeros(_B, 2).int(), v_block_table=torch.zeros(_B, 2).int()
        ),
        "padding mask": lambda m: _decode(m, key_mask=torch.ones(_B, _T).bool()),
        "window": lambda m: _decode(m, window=(3, 0)),
        "softcap": lambda m: _decode(m, softcap=30.0),
        "sinks": lambda m: _decode(m, sinks=torch.zeros(2 * _H).to(m.dtype)),
        "exclusive outputs and gate": lambda m: _decode(
            m, exclusive=1.0, out_gate=torch.ones(2 * _H, 1).to(m.dtype)
        ),
        "LSE": lambda m: _decode(m, return_lse=True),
    },
    "mix_values": {
        "two sources": lambda m: _mix(m, 2),
        "twelve sources": lambda m: _mix(m, 12),
        "coefficients per element": lambda m: _mix(m, 2, _B, _T, _H, _D),
    },
    "mix_value_embedding": {
        "gate per head": _embedding,
        "sparse gradient": lambda m: _embedding(m, sparse_grad=True),
    },
    "linear_scan": {
        "gates of every step": _scan,
        "constant gates": lambda m: _scan(m, _D),
        "packed sequences": lambda m: _scan(m, cu_seqlens=m.lengths(_B * _T)),
        "reverse": lambda m: _scan(m, reverse=True),
    },
    "reservoir_scan": {
        "dense W": _reservoir,
        "groups": lambda m: _reservoir(m, "groups"),
        "diagonal": lambda m: _reservoir(m, "diagonal"),
        "ring": lambda m: _reservoir(m, "ring"),
        "CSR": lambda m: _reservoir(m, "csr"),
        "bfloat16 W": lambda m: _reservoir(m, stored=torch.bfloat16),
        "fused input projection": lambda m: _reservoir(m, inputs=3),
        "packed sequences": lambda m: _reservoir(m, cu_seqlens=m.lengths(_B * _T)),
        "chunks of time": lambda m: _reservoir(m, mode="chunked"),
        "last state": lambda m: _reservoir(m, reduce="last"),
        "Gram matrix": lambda m: _reservoir(m, reduce="gram"),
    },
}
"""Forms of a call of each op, the plainest first."""


class _Supposed(Hardware):
    """An H100 with everything installed that a backend can ask for."""

    def cpu_library_reason(self) -> None:
        return None

    def cuda_library_reason(self, device: torch.device) -> None:
        del device

    def cuda_memory(self, device: torch.device) -> tuple[int, int]:
        del device
        return _MEMORY

    def capability(self, device: torch.device) -> tuple[int, int]:
        del device
        return arch.STAND_IN

    def triton_reason(self, device: torch.device) -> str | None:
        return None if device.type == "cuda" else "it runs on CUDA tensors"

    def triton_reason_against_auto(self, device: torch.device) -> None:
        del device

    def package(self, name: str, load: Callable[[str], Any]) -> tuple[str, ...]:
        del name, load
        return ()


def answers() -> Iterator[Answer]:
    """One answer for each op, feature, backend, device and dtype that the op's checks accept."""
    for op, forms in FEATURES.items():
        for feature, form in forms.items():
            for dtype in DTYPES:
                yield from _ask(op, feature, form, dtype)


def _ask(
    op: str, feature: str, form: Callable[[_Make], Call], dtype: torch.dtype
) -> Iterator[Answer]:
    try:
        function, arguments, named = form(_Make(dtype))
        request = prepare(function, *arguments, **named)
    except (TypeError, ValueError):
        return  # the op itself refuses this dtype
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for device, call in (("cpu", request.call), ("cuda", _on_cuda(request.call, mode))):
            for backend in request.backends:
                reason = backend.unsupported_reason(call, _Supposed())
                name = str(dtype).removeprefix("torch.")
                yield Answer(op, feature, backend.NAME, device, name, reason)


def _on_cuda(value: Any, mode: FakeTensorMode) -> Any:
    """A call's record with fake tensors on a GPU, which need not exist."""
    if isinstance(value, Tensor):
        shape = (value.shape, value.stride()) if value.layout is torch.strided else (value.shape,)
        make = torch.empty_strided if value.layout is torch.strided else torch.empty
        meta = make(*shape, dtype=value.dtype, device="meta")
        fake = FakeTensor(mode, meta, torch.device("cuda", 0))
        return fake.requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        moved = [_on_cuda(part, mode) for part in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return [_on_cuda(part, mode) for part in value] if isinstance(value, list) else value

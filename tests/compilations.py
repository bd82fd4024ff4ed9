"""How often each Triton kernel is compiled for calls that differ in batch, heads and lengths alone.

`python -m tests.compilations` prints the table; it needs Triton, and no GPU.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from resformer_kernels._triton.cases import case_from_launch
from resformer_kernels._triton.launch import Launch, assumed_capability, recorded_launches
from resformer_kernels._triton.specialise import identity as known

BATCHES = (1, 3, 16)
HEADS = (1, 2, 3, 12, 16)
LENGTHS = (1, 2, 3, 15, 16, 17, 32, 33, 1000, 1024, 4096, 100000)
SQUARES = tuple(length for length in LENGTHS if length < 10000)
"""Lengths of calls with a tensor over queries and keys: offsets fit 32 bits."""
CAPABILITY = 90
TILE = (
    *("ROWS", "KEYS", "BLOCK", "BLOCK_K", "BLOCK_V", "UNITS", "SPLIT", "SPLITS", "PARTS"),
    *("STEPS", "AT_ONCE", "HEADS", "AHEAD", "MIXES", "FORM", "ADJOINT", "BY_ROWS"),
)
"""Constants of a tile, which launchers choose by length, and of forms: a kernel for each."""

Run = Callable[[int, int, int], None]
_found: dict[Any, str] = {}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(**form: Any) -> Run:
    from resformer_kernels.attention.op import BackwardCall
    from resformer_kernels.attention.record import LEAVES, AttentionCall
    from resformer_kernels.attention.triton.backward import backward
    from resformer_kernels.attention.triton.forward import forward

    def run(batch: int, heads: int, length: int) -> None:
        packed, bias = form.get("packed", False), form.get("bias")
        rows = (batch * length,) if packed else (batch, length)
        k, v, first = (_meta(*rows, heads, 128, dtype=torch.bfloat16) for _ in range(3))
        q = _meta(*rows, heads * form.get("group", 1), 128, dtype=torch.bfloat16)
        shape = {"head": (heads, 1), "full": (*rows, heads, 128)}.get(form.get("coefficient", ""))
        factor = None
        if shape is not None:
            factor = _meta(*(1,) * (len(rows) + 2 - len(shape)), *shape)
        of_rows = {
            "head": (*(1,) * len(rows), q.shape[-2], 1),
            "token": (*rows, q.shape[-2], 1),
            "full": (*rows, q.shape[-2], 128),
        }
        exclusive, gate = form.get("exclusive"), form.get("gate")
        offsets = _meta(batch + 1, dtype=torch.int32) if packed else None
        call = AttentionCall(
            *(q, k, v, first, factor, factor, 0.5, 0.5, offsets, offsets, length, length),
            window_left=form.get("window", -1),
            window_right=0 if form.get("causal", True) else -1,
            scale=0.1,
            softcap=0.0,
            sinks=_meta(q.shape[-2]),
            attn_bias=None if bias is None else bias(batch, heads, length),
            return_lse=True,
            return_mixed_value=False,
            exclusive=_meta(*of_rows[exclusive]) if exclusive else None,
            out_gate=_meta(*of_rows[gate]) if gate else None,
            return_along=exclusive is not None,
            return_ungated=gate is not None,
        )
        forward(call, inline=False)
        out, lse, _, along, _ = forward(call, inline=True)
        kept = along if exclusive else None
        backward(BackwardCall(out, lse, None, call, out, lse, kept, 2 ** len(LEAVES) - 1))

    return run


def _cache(**form: Any) -> Run:
    from resformer_kernels.kvcache.record import KVCacheCall
    from resformer_kernels.kvcache.triton.attend import attend

    def run(batch: int, heads: int, length: int) -> None:
        pages, dtype = form.get("page_size", 0), form.get("dtype", torch.bfloat16)
        rows = (batch, length)
        if pages:
            rows = (batch * -(-length // pages), pages)
        cache = _meta(*rows, heads, 128, dtype=dtype)
        scale = _meta(*rows, heads) if dtype is torch.int8 else None
        queries = form.get("queries", 1)
        time = (1, batch * queries) if form.get("packed") else (batch, queries)
        offsets = _meta(batch + 1, dtype=torch.int32) if form.get("packed") else None
        new = _meta(*time, heads, 128, dtype=torch.bfloat16)
        table = _meta(batch, -(-length // pages), dtype=torch.int32) if pages else None
        query_rows = (*time, heads * form.get("group", 1))
        per_row, per_channel = _meta(*query_rows, 1), _meta(*query_rows, 128, dtype=torch.bfloat16)
        factors = {
            "per row": (per_row, per_row),
            "per head": (per_row[:1, :1], per_row[:1, :1]),
            "per channel": (per_row, per_channel),
        }
        exclusive, gate = factors.get(form.get("finished", ""), (None, None))
        call = KVCacheCall(
            q=new.repeat(1, 1, form.get("group", 1), 1),
            k_cache=cache,
            v_cache=cache,
            k=new,
            v=new,
            cache_seqlens=_meta(batch, dtype=torch.int32),
            block_table=table,
            v_block_table=None,
            cu_seqlens_q=offsets,
            max_seqlen_q=queries,
            cu_seqlens_k_new=offsets,
            key_mask=_meta(batch, length, dtype=torch.bool) if form.get("mask") else None,
            window_left=-1,
            window_right=0,
            scale=0.1,
            softcap=0.0,
            sinks=None,
            k_scale=scale,
            v_scale=scale,
            num_splits=form.get("splits", 0),
            return_lse=True,
            out=None,
            exclusive=exclusive,
            out_gate=gate,
        )
        attend(call)

    return run


def _mix(shape: Callable[[int, int, int], tuple[int, ...]], dtype: torch.dtype) -> Run:
    from resformer_kernels.mix.op import MixBackwardCall
    from resformer_kernels.mix.record import MixCall
    from resformer_kernels.mix.triton.backward import mix_values_backward
    from resformer_kernels.mix.triton.forward import mix_values_forward

    def run(batch: int, heads: int, length: int) -> None:
        values = tuple(_meta(batch, length, heads, 64, dtype=dtype) for _ in range(2))
        factor = _meta(*shape(batch, heads, length))
        call = MixCall(values, (factor, factor), (1.0, 1.0))
        mix_values_forward(call)
        mix_values_backward(MixBackwardCall(values[0], call, (1, 1, 1, 1)))

    return run


def _embedding(batch: int, heads: int, length: int) -> None:
    from resformer_kernels.mix import op
    from resformer_kernels.mix.record import EmbeddingCall
    from resformer_kernels.mix.triton.forward import mix_value_embedding_forward
    from resformer_kernels.mix.triton.scatter import mix_value_embedding_backward

    v = _meta(batch, length, heads, 64, dtype=torch.bfloat16)
    table, gate = _meta(32768, heads, 64), _meta(batch, length, heads, 1)
    ids = _meta(batch, length, dtype=torch.int64)
    mix_value_embedding_forward(EmbeddingCall(v, table, ids, gate, 1.0, False))
    call = op.EmbeddingBackwardCall(v, table, ids, gate, 1.0)
    mix_value_embedding_backward(op.DenseBackwardCall(call, op.WANTS_TABLE | op.WANTS_GATE))


def _scan(dtype: torch.dtype, *, constant: bool = False, packed: bool = False) -> Run:
    from resformer_kernels.scan.op import BackwardCall
    from resformer_kernels.scan.record import ScanCall, state_dtype
    from resformer_kernels.scan.triton.backward import backward
    from resformer_kernels.scan.triton.forward import forward

    def run(batch: int, heads: int, length: int) -> None:
        width = 128 * heads
        rows = (batch * length,) if packed else (batch, length)
        tokens = _meta(*rows, width, dtype=dtype)
        gates = _meta(width, dtype=dtype) if constant else tokens
        offsets = _meta(batch + 1, dtype=torch.int32) if packed else None
        state = _meta(batch, width, dtype=state_dtype(dtype))
        forward(ScanCall(gates, tokens, state, False, offsets))
        backward(BackwardCall(tokens, state, gates, tokens, state, False, offsets, 7))

    return run


def _reservoir(kind: str, mode: int, *, packed: bool = False) -> Run:
    from resformer_kernels.reservoir.record import TANH, AdjointCall, ReservoirCall
    from resformer_kernels.reservoir.triton import recurrence

    def run(batch: int, heads: int, length: int) -> None:
        units = 64 * heads + heads % 2
        rows, columns, weight = None, None, _meta(units, units)
        if kind == "csr":
            weight, rows = _meta(10 * units), _meta(units + 1, dtype=torch.int64)
            columns = _meta(10 * units, dtype=torch.int64)
        elif kind == "ring":
            weight, columns = _meta(units), _meta(units, dtype=torch.int64)
        shape = (batch * length,) if packed else (batch, length)
        offsets = _meta(batch + 1, dtype=torch.int32) if packed else None
        given, grad, vector = _meta(*shape, heads), _meta(*shape, units), _meta(units)
        recurrence.forward(
            ReservoirCall(
                *(given, weight, rows, columns, _meta(units, heads), vector, vector),
                *(_meta(batch, units), TANH, mode, 3e-6, offsets),
            )
        )
        tolerance = _meta(dtype=torch.float64)
        recurrence.adjoint(
            AdjointCall(grad, grad, weight, rows, columns, vector, mode, tolerance, offsets)
        )

    return run


def forms() -> Iterator[tuple[str, str, Run, tuple[int, ...]]]:
    """(op, form, a call of batch, heads and length, the lengths)."""
    from resformer_kernels.reservoir.record import CHUNKED, SEQUENTIAL

    masks: dict[str, Any] = {
        "mask": lambda b, _h, n: _meta(b, 1, n, n, dtype=torch.bool),
        "bias": lambda _b, h, n: _meta(1, h, n, n),
        "bias per key": lambda _b, _h, n: _meta(1, 1, 1, n),
    }
    yield "attention", "causal", _attention(), LENGTHS
    yield "attention", "full, groups of 4", _attention(causal=False, group=4), LENGTHS
    yield "attention", "window", _attention(window=512), LENGTHS
    yield (
        "attention",
        "packed, coefficient per head",
        _attention(packed=True, coefficient="head"),
        LENGTHS,
    )
    yield "attention", "coefficient per element", _attention(coefficient="full"), LENGTHS
    both = _attention(exclusive="token", gate="token", group=2)
    yield "attention", "exclusive and gate per token", both, LENGTHS
    both = _attention(exclusive="head", gate="full", packed=True)
    yield "attention", "exclusive per head, gate per element, packed", both, LENGTHS
    for name, bias in masks.items():
        yield "attention", name, _attention(causal=False, bias=bias), SQUARES
    yield "kvcache", "decode", _cache(), LENGTHS
    yield "kvcache", "decode, 4 splits, groups of 4", _cache(splits=4, group=4), LENGTHS
    yield "kvcache", "packed, pages of 16", _cache(packed=True, page_size=16, queries=2), LENGTHS
    yield "kvcache", "int8", _cache(dtype=torch.int8), LENGTHS
    yield "kvcache", "pages of 256", _cache(page_size=256), LENGTHS
    yield "kvcache", "key_mask, 3 queries", _cache(mask=True, queries=3), LENGTHS
    for factors in ("per row", "per head", "per channel"):
        yield "kvcache", f"XSA and gate {factors}", _cache(finished=factors, splits=4), LENGTHS
    yield "mix", "number for all", _mix(lambda _b, _h, _n: (1, 1, 1, 1), torch.bfloat16), LENGTHS
    yield "mix", "per head", _mix(lambda _b, h, _n: (1, 1, h, 1), torch.bfloat16), LENGTHS
    yield "mix", "per token and head", _mix(lambda b, h, n: (b, n, h, 1), torch.bfloat16), LENGTHS
    yield "mix", "per element, float32", _mix(lambda b, h, n: (b, n, h, 64), torch.float32), LENGTHS
    yield "mix", "embedding", _embedding, LENGTHS
    yield "scan", "float32", _scan(torch.float32), LENGTHS
    yield "scan", "bfloat16, constant gates", _scan(torch.bfloat16, constant=True), LENGTHS
    yield "scan", "complex64, packed", _scan(torch.complex64, packed=True), LENGTHS
    yield "reservoir", "dense, chunked", _reservoir("dense", CHUNKED), LENGTHS
    yield "reservoir", "CSR, chunked, packed", _reservoir("csr", CHUNKED, packed=True), LENGTHS
    yield "reservoir", "ring, sequential", _reservoir("ring", SEQUENTIAL), LENGTHS


def _names(value: Any, path: tuple[int, ...]) -> str:
    """The name of a constant within its tuples."""
    for place in path[:-1]:
        value = value[place]
    fields = getattr(value, "_fields", None)
    return str(fields[path[-1]] if fields else path[-1])


def identity(launch: Launch) -> tuple[str, str]:
    """(a kernel and its tile, everything else that it is compiled for)."""
    case = case_from_launch("", launch, capability=CAPABILITY)
    arguments = [launch.kwargs.get(name) for name in case.signature]
    tile: list[Any] = []
    rest: list[Any] = []
    for path, constant in case.constants.items():
        name = list(case.signature)[path[0]] if len(path) == 1 else _names(arguments, path)
        (tile if name in TILE else rest).append((path, str(constant)))
    kernel = launch.kernel.__name__.removesuffix("_kernel")
    at = f"{kernel} {tile} {case.num_warps} {case.num_stages}"
    rest_of = f"{case.signature} {rest} {case.attrs} {case.options}"
    known_by = known(launch.kernel, launch.kwargs)
    # What launches find a compiled kernel by must tell apart what is compiled apart.
    assert _found.setdefault(known_by, at + rest_of) == at + rest_of, launch
    return at, rest_of


def count() -> dict[tuple[str, str, str], int]:
    """The most compilations of a kernel at one tile, by (op, form, kernel)."""
    found: dict[tuple[str, str, str], int] = {}
    for op, form, run, lengths in forms():
        compiled = defaultdict(set)
        for sizes in product(BATCHES, HEADS, lengths):
            with assumed_capability((9, 0)), recorded_launches() as launches:
                run(*sizes)
            for launch in launches:
                at, rest = identity(launch)
                compiled[at].add(rest)
        for at, variants in compiled.items():
            key = (op, form, at.split()[0])
            found[key] = max(found.get(key, 0), len(variants))
    return found


if __name__ == "__main__":
    for (op, form, kernel), compilations in count().items():
        sys.stdout.write(f"| {op} | {form} | {kernel} | {compilations} |\n")

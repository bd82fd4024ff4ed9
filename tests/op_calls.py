"""One small call, or several, of every op that a Triton launcher serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from resformer_kernels._core.op import Op
from resformer_kernels.attention import epilogue_op
from resformer_kernels.attention import op as attention
from resformer_kernels.attention.record import LEAVES, AttentionCall
from resformer_kernels.kvcache import op as kvcache
from resformer_kernels.kvcache.record import KVCacheCall
from resformer_kernels.mix import op as mix
from resformer_kernels.mix.record import EmbeddingCall, MixCall
from resformer_kernels.reservoir import op as reservoir
from resformer_kernels.reservoir.record import (
    CHUNKED,
    SEQUENTIAL,
    TANH,
    AdjointCall,
    ReducedCall,
    ReservoirCall,
)
from resformer_kernels.reservoir.record import BackwardCall as ReservoirBackwardCall
from resformer_kernels.scan import op as scan
from resformer_kernels.scan.record import ScanCall

HALF = torch.float16


class OpCall(NamedTuple):
    """A call of an op."""

    name: str
    op: Op
    call: Any

    def again(self, device: str = "cpu") -> tuple[Any, ...]:
        """The op's arguments, copied; what was one tensor stays one."""
        copies: dict[int, Tensor] = {}

        def copy(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return copies.setdefault(id(x), x.clone() if device == "cpu" else x.to(device))

        copied: tuple[Any, ...] = tree_map(copy, self.op.flatten(self.call))
        return copied


def _attention() -> Iterator[OpCall]:
    offsets = torch.tensor([0, 7, 20, 20, 33], dtype=torch.int32)
    mask = torch.rand(2, 1, 17, 19) > 0.3
    forms: tuple[tuple[str, tuple[int, ...], int, dict[str, Any]], ...] = (
        ("full", (2, 17), 2, {}),
        ("causal, grouped, sinks", (2, 17), 4, {"window_right": 0, "sinks": torch.randn(4)}),
        ("mask", (2, 17), 2, {"attn_bias": mask}),
        ("bias", (2, 17), 2, {"attn_bias": torch.randn(1, 2, 17, 19)}),
        ("packed", (33,), 2, {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}),
        (
            "exclusive, gate",
            (2, 17),
            4,
            {"exclusive": torch.randn(2, 17, 4, 1), "out_gate": torch.randn(1, 1, 4, 16)},
        ),
        (
            "packed, gate",
            (33,),
            2,
            {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "out_gate": torch.randn(33, 2, 1)},
        ),
    )
    for name, rows, heads, form in forms:
        packed = len(rows) == 1
        keys = rows if packed else (2, 19)
        own = torch.randn(*(1,) * len(rows), 2, 1)
        k, v, first = (torch.randn(*keys, 2, 16, dtype=HALF) for _ in range(3))
        defaults: dict[str, Any] = {
            "cu_seqlens_q": None,
            "cu_seqlens_k": None,
            "window_left": -1,
            "window_right": -1,
            "scale": 0.25,
            "softcap": 0.0,
            "sinks": None,
            "attn_bias": None,
            "return_lse": True,
            "return_mixed_value": False,
        }
        call = AttentionCall(
            q=torch.randn(*rows, heads, 16, dtype=HALF),
            k=k,
            v=v,
            v_first=first,
            lambda_v=own,
            lambda_first=None,
            lambda_v_value=1.0,
            lambda_first_value=0.5,
            max_seqlen_q=20 if packed else rows[-1],
            max_seqlen_k=20 if packed else keys[-1],
            **{**defaults, **form},
        )
        call = call._replace(return_along=call.excludes, return_ungated=call.out_gate is not None)
        yield OpCall(f"attention {name}", attention.FORWARD, call)
        *batch, time = rows
        lse = torch.rand(*batch, heads, time)
        out = torch.randn_like(call.q)
        along = torch.randn(*batch, heads, time) if call.excludes else None
        mask = 2 ** len(LEAVES) - 1
        back = attention.BackwardCall(out, None, None, call, out, lse, along, mask)
        yield OpCall(f"attention {name}, backward", attention.BACKWARD, back)
        if not call.plain:
            of = epilogue_op.epilogue_of(call, out, call.value)
            yield OpCall(f"epilogue {name}", epilogue_op.FORWARD, of)
            of_epilogue = epilogue_op.EpilogueBackwardCall(
                out, of, 2 ** len(epilogue_op.LEAVES) - 1
            )
            yield OpCall(f"epilogue {name}, backward", epilogue_op.BACKWARD, of_epilogue)


def _kvcache() -> Iterator[OpCall]:
    table = torch.tensor([[2, 0, 3], [1, 4, 5]], dtype=torch.int32)
    codes = torch.randint(-127, 128, (2, 40, 2, 16), dtype=torch.int8)
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32)
    packed: dict[str, Any] = {
        **{name: torch.randn(1, 5, 2, 16, dtype=HALF) for name in ("k", "v")},
        "q": torch.randn(1, 5, 4, 16, dtype=HALF),
        "cu_seqlens_q": offsets,
        "cu_seqlens_k_new": offsets,
        "max_seqlen_q": 3,
        "block_table": table,
    }
    for name, k_cache, form in (
        ("whole", torch.randn(2, 40, 2, 16, dtype=HALF), {}),
        ("split", torch.randn(2, 40, 2, 16, dtype=HALF), {"num_splits": 2}),
        ("pages", torch.randn(6, 16, 2, 16, dtype=HALF), {"block_table": table}),
        (
            "packed",
            torch.randn(6, 16, 2, 16, dtype=HALF),
            packed | {"v_block_table": table.flip(0)},
        ),
        ("packed, split", torch.randn(6, 16, 2, 16, dtype=HALF), {**packed, "num_splits": 2}),
        ("int8", codes, {"k_scale": torch.rand(2, 40, 2), "v_scale": torch.rand(2, 40, 2)}),
        (
            "key_mask",
            torch.randn(2, 40, 2, 16, dtype=HALF),
            {"key_mask": torch.rand(2, 40) > 0.2},
        ),
    ):
        defaults: dict[str, Any] = {
            "q": torch.randn(2, 1, 4, 16, dtype=HALF),
            "k": torch.randn(2, 1, 2, 16, dtype=HALF),
            "v": torch.randn(2, 1, 2, 16, dtype=HALF),
            "block_table": None,
            "v_block_table": None,
            "cu_seqlens_q": None,
            "max_seqlen_q": 0,
            "cu_seqlens_k_new": None,
            "key_mask": None,
            "k_scale": None,
            "v_scale": None,
            "num_splits": 1,
        }
        call = KVCacheCall(
            k_cache=k_cache,
            v_cache=k_cache.clone(),
            cache_seqlens=torch.tensor([5, 30], dtype=torch.int32),
            window_left=-1,
            window_right=0,
            scale=0.25,
            softcap=0.0,
            sinks=None,
            return_lse=True,
            out=None,
            **{**defaults, **form},
        )
        yield OpCall(f"kvcache {name}", kvcache.OP, call)


def _mix() -> Iterator[OpCall]:
    values = (torch.randn(2, 9, 2, 16, dtype=HALF), torch.randn(2, 9, 2, 16, dtype=HALF))
    for name, shape in (("per head", (1, 1, 2, 1)), ("per element", (2, 9, 2, 16))):
        call = MixCall(values, (torch.randn(shape), torch.randn(0)), (1.0, 0.5))
        yield OpCall(f"mix {name}", mix.VALUES_FORWARD, call)
        back = mix.MixBackwardCall(values[0], call, (1, 1, 1, 0))
        yield OpCall(f"mix {name}, backward", mix.VALUES_BACKWARD, back)
    table, gate = torch.randn(11, 2, 16), torch.randn(2, 9, 2, 1)
    ids = torch.randint(0, 11, (2, 9))
    given = EmbeddingCall(values[0], table, ids, gate, 1.0, False)
    yield OpCall("embedding", mix.EMBEDDING_FORWARD, given)
    of = mix.EmbeddingBackwardCall(values[0], table, ids, gate, 1.0)
    dense = mix.DenseBackwardCall(of, mix.WANTS_TABLE | mix.WANTS_GATE)
    yield OpCall("embedding, backward", mix.EMBEDDING_BACKWARD, dense)
    yield OpCall("embedding, sparse backward", mix.EMBEDDING_SPARSE, of)


def _scan() -> Iterator[OpCall]:
    offsets = torch.tensor([0, 5, 5, 18], dtype=torch.int32)
    for name, rows, dtype, cu_seqlens in (
        ("batch", (2, 9), torch.float32, None),
        ("packed, complex", (18,), torch.complex64, offsets),
    ):
        tokens, gates = torch.randn(*rows, 8, dtype=dtype), 0.9 * torch.rand(8).to(dtype)
        sequences = 2 if cu_seqlens is None else 3
        state = torch.randn(sequences, 8, dtype=dtype)
        call = ScanCall(gates, tokens, state, False, cu_seqlens)
        yield OpCall(f"scan {name}", scan.FORWARD, call)
        back = scan.BackwardCall(tokens, state, gates, tokens, state, False, cu_seqlens, 7)
        yield OpCall(f"scan {name}, backward", scan.BACKWARD, back)


def _reservoir() -> Iterator[OpCall]:
    weight, vector = 0.1 * torch.randn(16, 16), torch.rand(16)
    for name, mode in (("sequential", SEQUENTIAL), ("chunked", CHUNKED)):
        inputs, state = torch.randn(2, 40, 3), torch.randn(2, 16)
        given = (inputs, weight, None, None, torch.randn(16, 3), vector, vector, state)
        call = ReservoirCall(*given, TANH, mode, 3e-6, None)
        yield OpCall(f"reservoir {name}", reservoir.FORWARD, call)
        grad, tolerance = torch.randn(2, 40, 16), torch.tensor(1e-6, dtype=torch.float64)
        back = AdjointCall(grad, grad, weight, None, None, vector, mode, tolerance, None)
        yield OpCall(f"reservoir {name}, adjoint", reservoir.ADJOINT, back)


def composed_calls() -> list[OpCall]:
    """Calls of the ops that are composed of others, where these do not wait for the device."""
    inputs, weight, vector = torch.randn(2, 40, 3), 0.1 * torch.randn(16, 16), torch.rand(16)
    given = (inputs, weight, None, None, torch.randn(16, 3), vector, vector, torch.randn(2, 16))
    call = ReservoirCall(*given, TANH, CHUNKED, 3e-6, None)
    states, grad_mask = torch.randn(2, 40, 16), 2 ** len(reservoir.LEAVES) - 1
    back = ReservoirBackwardCall(states, None, call, states, grad_mask)
    return [
        OpCall("reservoir, backward", reservoir.BACKWARD, back),
        OpCall("reservoir, mean", reservoir.REDUCED, ReducedCall(call, "mean", None)),
        OpCall("reservoir, gram", reservoir.REDUCED, ReducedCall(call, "gram", states)),
    ]


def op_calls() -> list[OpCall]:
    """The calls, with the same numbers each time."""
    torch.manual_seed(0)
    return [*_attention(), *_kvcache(), *_mix(), *_scan(), *_reservoir()]

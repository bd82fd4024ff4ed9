"""Causal self-attention on a CPU, beside every way to do it that is installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.workloads.common import (
    COMPILED,
    FLASH_ATTN,
    compiled,
    cuda_only,
    require_package,
)
from benchmarks.workloads.device import FA3, FLEX, DeviceAttention
from resformer_kernels.bench.attention import SDPA, AttentionBenchmark, mix_and_sdpa
from resformer_kernels.bench.timing import Call, Unavailable, timed_call

MATH = "SDPA math"
X_TRANSFORMERS = "x-transformers"

QUICK = (*SDPA, X_TRANSFORMERS, FLASH_ATTN, FA3)
PEERS = (*QUICK, MATH, COMPILED, FLEX)
"""The last three are slow: one writes every score, two compile for seconds a shape."""

_MOST_SCORES = 512 * 2**20
"""Bytes of float32 scores beyond which SDPA's plain mathematics are left out."""


def _math(case: AttentionBenchmark) -> Call:
    scores = 4 * case.batch * case.heads * case.length**2
    if scores > _MOST_SCORES:
        raise Unavailable(f"would hold {scores / 2**30:.1f} GiB of scores, some times over")
    return case.sdpa(sdpa_kernel([SDPBackend.MATH])(mix_and_sdpa), heads_first=True)


def _flex(case: AttentionBenchmark) -> Call:
    if case.direction == "backward":
        raise Unavailable("torch has no backward of it on a CPU")
    same = {field.name: getattr(case, field.name) for field in fields(case)}
    return DeviceAttention(**{**same, "peers": (FLEX,)}).makers()[FLEX]()


def _x_transformers(case: AttentionBenchmark) -> Call:
    """Its `Attention` without projections: V' = lerp(V₁, V, 0.5), then its choice of SDPA.

    Its gates are linear layers of the input, and would be timed too: the fixed mix is not.
    """
    require_package("x_transformers")
    if case.heads != case.kv_heads:
        raise Unavailable("takes q, k and v of one width where projections are left out")
    module = importlib.import_module("x_transformers.x_transformers")
    attention = module.Attention(
        case.heads * case.head_dim,
        heads=case.heads,
        dim_head=case.head_dim,
        causal=True,
        flash=True,
        qkv_receive_diff_residuals=True,
    )
    for projection in ("to_q", "to_k", "to_v", "to_out"):
        setattr(attention, projection, torch.nn.Identity())
    *qkv, v_first = case.leaves()[:4]
    leaves = [torch.stack(qkv).flatten(3), v_first.transpose(1, 2).contiguous()]

    def attend() -> Tensor:
        out: Tensor = attention(leaves[0], value_residual=leaves[1])
        return out

    return timed_call(attend, leaves, case.direction)


@dataclass(frozen=True)
class CPUAttention(AttentionBenchmark):
    """An attention case with `PEERS` to choose from."""

    known_peers: ClassVar[Mapping[str, Callable[[Any], Call]]] = {
        **AttentionBenchmark.known_peers,
        MATH: _math,
        X_TRANSFORMERS: _x_transformers,
        FLASH_ATTN: lambda _: cuda_only("flash_attn"),
        FA3: lambda _: cuda_only("flash_attn_interface"),
        COMPILED: lambda case: case.sdpa(compiled(mix_and_sdpa), heads_first=False),
        FLEX: _flex,
    }

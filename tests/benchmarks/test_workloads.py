"""The cases' arithmetic, and that every contestant of a case computes the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.workloads.attention import MATH, CPUAttention
from benchmarks.workloads.mix import STACKED, EmbeddingBenchmark, MixBenchmark
from resformer_kernels.bench.attention import SDPA, attended_pairs

FORWARD = CPUAttention(2, 4, 2, 16, 8, torch.float32, "forward")


@pytest.mark.parametrize(("length", "window"), [(5, None), (5, 2), (5, 5), (5, 9), (7, 1)])
def test_attended_pairs_counts_the_mask(length: int, window: int | None) -> None:
    query, key = torch.arange(length)[:, None], torch.arange(length)
    mask = key <= query
    if window is not None:
        mask &= key > query - window
    assert attended_pairs(length, window) == int(mask.sum())


def test_flops_and_bytes_follow_the_definitions() -> None:
    pairs = 16 * 17 // 2
    assert FORWARD.flops == 2 * 2 * 4 * pairs * (8 + 8)
    assert replace(FORWARD, direction="backward").flops == int(2.5 * FORWARD.flops)
    q, kv = 2 * 4 * 16 * 8 * 4, 2 * 2 * 16 * 8 * 4
    assert FORWARD.bytes == 2 * q + 3 * kv
    window = replace(FORWARD, window=4)
    assert window.window_share == (4 * 5 // 2 + 12 * 4) / pairs
    assert window.flops == int(FORWARD.flops * window.window_share)
    assert FORWARD.window_share is None


def test_names_tell_cases_apart() -> None:
    assert FORWARD.name == "attention forward B2 Hq4 Hkv2 T16 D8 causal float32"
    window = replace(FORWARD, kv_heads=4, window=4, dtype=torch.bfloat16)
    assert window.name == "attention forward B2 H4 T16 D8 causal window 4 bfloat16"


def outcomes(
    case: CPUAttention | MixBenchmark | EmbeddingBenchmark, monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[Tensor]]:
    """The results of each contestant on equal numbers; heads-first ones transposed."""
    found = {}
    monkeypatch.setattr(CPUAttention, "grad", lambda _: None)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    for name, make in case.makers().items():
        torch.manual_seed(0)
        result: Any = make()()
        tensors = [result] if isinstance(result, Tensor) else result
        found[name] = [
            x.transpose(1, 2) if x.dim() == 4 and x.shape[1] != 16 else x for x in tensors
        ]
    return found


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    "case",
    [
        replace(FORWARD, peers=(*SDPA, MATH)),
        replace(FORWARD, kv_heads=4),
        MixBenchmark(3, 2, 16, 4, 8, torch.float32, "forward"),
        EmbeddingBenchmark(5, 2, 16, 4, 8, torch.float32, "forward"),
    ],
)
def test_contestants_agree(
    case: CPUAttention | MixBenchmark | EmbeddingBenchmark,
    direction: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = outcomes(replace(case, direction=direction), monkeypatch)
    for name, tensors in found.items():
        if name == STACKED and direction == "backward":
            # One gradient for all values.
            tensors[:1] = tensors[0].unbind()
        assert len(tensors) == len(found["ours"])
        for got, expected in zip(tensors, found["ours"], strict=True):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4, msg=name)

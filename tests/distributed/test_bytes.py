"""What a ring moves and holds: bytes counted where tensors are handed to torch.distributed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from benchmarks import scaling
from resformer_kernels import value_residual_attention
from resformer_kernels.distributed import Traffic, context_parallel, traffic
from tests.distributed import ranks

B, T, HQ, HKV, D = 1, 64, 4, 2, 16
SHARD = B * T * HKV * D * 4
"""Bytes of the keys, or values, of a whole sequence in float32."""


def _inputs(layers: int = 1) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    names = {"q": HQ, "k": HKV, "v": HKV, "v_first": HKV}
    return [{n: torch.randn(B, T, h, D) for n, h in names.items()} for _ in range(layers)]


def _record(found: Traffic) -> dict[str, Any]:
    return {"sent": dict(found.sent), "calls": dict(found.calls), "most": found.most_held}


def _move(variant: str, balanced: bool, options: dict[str, Any]) -> dict[str, Any]:
    (whole,) = _inputs()
    with context_parallel(dist.group.WORLD, length=T, balanced=balanced) as sequence:
        parts = {n: sequence.shard(x, 1).requires_grad_() for n, x in whole.items()}
        v = None if variant == "svformer" else parts["v"]
        with traffic() as forward:
            out = value_residual_attention(parts["q"], parts["k"], v, parts["v_first"], **options)
        with traffic() as backward:
            out.sum().backward()
    return {"forward": _record(forward), "backward": _record(backward)}


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("balanced", [True, False])
def test_a_ring_step_of_svformer_moves_half_the_bytes(world: int, balanced: bool) -> None:
    both = {
        variant: ranks.run(world, _move, variant, balanced, {})
        for variant in ("resformer", "svformer")
    }
    each = SHARD // world * (world - 1)
    for resformer, svformer in zip(both["resformer"], both["svformer"], strict=True):
        assert resformer["forward"]["sent"] == {"k": each, "v": each}
        assert svformer["forward"]["sent"] == {"k": each, "v_first": each}
        steps = 2 * (world - 1)
        assert resformer["forward"]["calls"] == {"k": steps, "v": steps}
        assert svformer["forward"]["calls"] == {"k": steps, "v_first": 1}
        assert resformer["backward"]["sent"] == {"k": each, "v": each, "dk": each, "dv": each}
        assert svformer["backward"]["sent"] == {"k": each, "dk": each, "dv_first": each}


@pytest.mark.parametrize("balanced", [True, False])
def test_a_rank_never_holds_more_than_two_shards(balanced: bool) -> None:
    shard = SHARD // 4
    for variant, kinds in (("resformer", 2), ("svformer", 1)):
        for found in ranks.run(4, _move, variant, balanced, {}):
            # Its own, and as much again on its way: a piece attended to, and one that arrives.
            assert found["forward"]["most"] == shard * kinds
            # Backward: the gradients of its own that return as well, one piece of them.
            assert found["backward"]["most"] <= shard * kinds * 3 // 2


def test_causal_masks_and_windows_move_what_is_seen() -> None:
    causal = ranks.run(4, _move, "resformer", False, {"causal": True})
    shard = SHARD // 4
    # In the plain form rank r is needed by the ranks after it.
    assert [found["forward"]["sent"]["k"] for found in causal] == [shard * n for n in (3, 2, 1, 0)]
    local = ranks.run(4, _move, "resformer", False, {"window": (5, 0)})
    assert [found["forward"]["sent"]["k"] for found in local] == [shard // 2] * 3 + [0]
    assert [found["forward"]["calls"]["k"] for found in local] == [1] * 4


def _copies() -> list[Any]:
    (part,) = _inputs()
    with context_parallel(dist.group.WORLD, length=T) as sequence, traffic() as found:
        q, k, first = (sequence.shard(part[name], 1) for name in ("q", "k", "v_first"))
        both = [first.requires_grad_(), first.detach().requires_grad_()]
        for times, leaf in enumerate(both, 1):
            (times * value_residual_attention(q, k, None, leaf, causal=True)).sum().backward()
        with torch.no_grad():
            first.mul_(2)
        value_residual_attention(q, k, None, first, causal=True)
    return [found.calls, *[leaf.grad for leaf in both]]


def test_copies_of_the_first_values_share_what_was_gathered() -> None:
    for calls, once, twice in ranks.run(2, _copies):
        torch.testing.assert_close(twice, 2 * once)
        # Values that were written to are gathered again.
        assert calls["v_first"] == calls["dv_first"] == 2


def _layers(checkpointing: bool) -> dict[str, Any]:
    layers = _inputs(3)
    with context_parallel(dist.group.WORLD, length=T) as sequence:
        parts = [
            {n: sequence.shard(x, 1).requires_grad_() for n, x in layer.items()} for layer in layers
        ]
        first = parts[0]["v_first"]

        def attend(q: Tensor, k: Tensor, v_first: Tensor) -> Tensor:
            return value_residual_attention(q, k, None, v_first, causal=True)

        with traffic() as found:
            total = torch.zeros(())
            for part in parts:
                arguments = part["q"], part["k"], first
                if checkpointing:
                    out = torch.utils.checkpoint.checkpoint(attend, *arguments, use_reentrant=False)
                else:
                    out = attend(*arguments)
                total = total + out.sum()
        with traffic() as back:
            total.backward()
        assert first.grad is not None
        return {
            "forward": _record(found),
            "backward": _record(back),
            "grad": sequence.gather(first.grad, 1),
        }


def test_first_values_are_gathered_once_a_forward() -> None:
    layers = _inputs(3)
    leaf = layers[0]["v_first"].requires_grad_()
    total = torch.zeros(())
    for layer in layers:
        out = value_residual_attention(layer["q"], layer["k"], None, leaf, causal=True)
        total = total + out.sum()
    total.backward()
    for checkpointing in (False, True):
        for found in ranks.run(2, _layers, checkpointing):
            assert found["forward"]["calls"]["v_first"] == 1
            # Layers that run again use what was gathered.
            assert "v_first" not in found["backward"]["calls"]
            assert found["backward"]["calls"]["dv_first"] == 1
            torch.testing.assert_close(found["grad"], leaf.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_the_model_of_scaling_counts_the_same_bytes(world: int) -> None:
    shape = scaling.Shape(T, 1, HQ, HKV, D, 4)
    for variant in ("resformer", "svformer"):
        svformer = variant == "svformer"
        for found in ranks.run(world, _move, variant, True, {"causal": True}):
            moved = sum(found["forward"]["sent"].values())
            back = sum(found["backward"]["sent"].values())
            # A balanced rank's last piece is seen by the ranks before it alone, and its first by
            # those after: under a causal mask some hops send nothing.
            assert moved <= scaling.forward_bytes(shape, world, svformer)
            assert back <= scaling.backward_bytes(shape, world, svformer)
        for found in ranks.run(world, _move, variant, True, {}):
            moved = sum(found["forward"]["sent"].values())
            assert moved == scaling.forward_bytes(shape, world, svformer)
            back = sum(found["backward"]["sent"].values())
            assert back == scaling.backward_bytes(shape, world, svformer)

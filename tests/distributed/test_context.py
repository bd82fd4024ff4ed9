"""`context_parallel`: models without a change, buffers, and what it refuses."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import CheckpointError

import resformer_kernels as ours
from resformer_kernels.distributed import context_parallel
from resformer_kernels.distributed.sequence import Deal
from resformer_kernels.models import LanguageModel, LanguageModelConfig
from resformer_kernels.models.config import VARIANTS
from tests.distributed import ranks

SMALL: dict[str, Any] = {
    "vocab_size": 17, "max_seqlen": 64, "dim": 24, "num_layers": 4, "num_heads": 4,
    "num_kv_heads": 2, "mlp_hidden": 20,
}  # fmt: skip
CONFIGS = [LanguageModelConfig(variant, **SMALL) for variant in VARIANTS] + [
    LanguageModelConfig(
        "svformer", **SMALL, exclusive="learned", gate="head", checkpointing=True, qk_norm=True
    ),
    LanguageModelConfig(
        "learnable-plus", **SMALL, window_pattern="SL", short_window=9, checkpointing=True
    ),
]


def _data(length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(17, (2, length + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1].clone(), ids[:, 1:].clone()


def _model(config: LanguageModelConfig) -> LanguageModel:
    torch.manual_seed(3)
    return LanguageModel(config)


def _sum_of_losses(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    logits = model(ids)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def _train(length: int, balanced: bool) -> list[dict[str, Tensor]]:
    found = []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for config in CONFIGS:
        model = _model(config)
        ids, targets = _data(length)
        with context_parallel(
            mesh,
            buffers=[ids, targets],
            buffer_seq_dims=[1, 1],
            no_restore_buffers={targets},
            balanced=balanced,
        ) as sequence:
            assert ids.shape[1] == sequence.positions.numel()
            logits = sequence.gather(model(ids).detach(), 1)
            total = _sum_of_losses(model, ids, targets)
            total.backward()
        assert torch.equal(ids, _data(length)[0])
        assert targets.shape[1] == sequence.positions.numel()
        results = {"loss": total.detach(), "logits": logits}
        for name, parameter in model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad)
            results[name] = grad
        dist.all_reduce(results["loss"])
        found.append(results)
    return found


@pytest.mark.parametrize(("world", "length", "balanced"), [(2, 33, True), (4, 30, False)])
def test_models_need_no_change(world: int, length: int, balanced: bool) -> None:
    every = ranks.run(world, _train, length, balanced)
    for i, config in enumerate(CONFIGS):
        model = _model(config)
        ids, targets = _data(length)
        total = _sum_of_losses(model, ids, targets)
        total.backward()
        expected = {"loss": total.detach(), "logits": model(ids).detach()}
        expected |= {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in model.named_parameters()
        }
        for found in every:
            for name, x in expected.items():
                torch.testing.assert_close(
                    found[i][name],
                    x,
                    rtol=0,
                    atol=2e-5 * max(x.abs().max().item(), 1e-2),
                    msg=partial("{}, {}: {}".format, config.variant, name),
                )


@pytest.mark.parametrize("length", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("balanced", [True, False])
def test_every_position_is_held_once(length: int, world: int, balanced: bool) -> None:
    deal = Deal(length, world, balanced)
    held = [p for pieces in deal.pieces for a, b in pieces for p in range(a, b)]
    assert sorted(held) == list(range(length))
    assert sum(map(deal.held, range(world))) == length
    assert max(map(deal.held, range(world))) - min(map(deal.held, range(world))) <= 2
    in_order = [deal.pieces[rank][index] for rank, index in deal.in_order]
    assert [p for a, b in in_order for p in range(a, b)] == list(range(length))


def _refused() -> dict[str, str]:
    x = torch.randn(1, 4, 2, 8)
    packed = torch.randn(4, 2, 8)
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    lengths: dict[str, Any] = {
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), offsets),
        **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), 4),
    }
    calls = {
        "packed": lambda: ours.value_residual_attention_varlen(packed, packed, packed, **lengths),
        "bias": lambda: ours.value_residual_attention(x, x, x, attn_bias=torch.zeros(4, 4)),
        "length": lambda: ours.value_residual_attention(x[:, :3], x[:, :3], x[:, :3]),
        "keys": lambda: ours.value_residual_attention(x, x[:, :3], x[:, :3]),
        "cache": lambda: ours.attention_with_kvcache(
            x[:, :1], x, x, cache_seqlens=torch.tensor([3], dtype=torch.int32)
        ),
        "backend": lambda: ours.value_residual_attention(x, x, x, backend="triton"),
    }
    found = {}
    with context_parallel(dist.group.WORLD, length=8) as sequence:
        calls["shard"] = lambda: sequence.shard(x, 1)
        calls["gather"] = lambda: sequence.gather(x[:, 1:], 1)
        calls["axis"] = lambda: sequence.gather(x, 4)
        for name, call in calls.items():
            try:
                call()
            except (RuntimeError, ValueError) as error:
                found[name] = str(error)
    for name, options in {
        "no length": {},
        "dims": {"buffers": [x], "buffer_seq_dims": []},
        "other length": {"buffers": [x], "buffer_seq_dims": [1], "length": 5},
        "no axis": {"buffers": [x], "buffer_seq_dims": [4]},
        "gradient": {"buffers": [x.clone().requires_grad_()], "buffer_seq_dims": [1]},
    }.items():
        try:
            with context_parallel(dist.group.WORLD, **options):  # type: ignore[arg-type]
                raise AssertionError("entered")
        except ValueError as error:
            found[name] = str(error)
    for name, mesh in {"mesh": 2, "axes": init_device_mesh("cpu", (1, 2))}.items():
        try:
            with context_parallel(mesh, length=8):
                raise AssertionError("entered")
        except (TypeError, ValueError) as error:
            found[name] = str(error)
    assert ours.value_residual_attention(x, x, x).shape == x.shape
    return found


def test_what_it_refuses_is_named() -> None:
    for found in ranks.run(2, _refused):
        for name, words in {
            "packed": "value_residual_attention_varlen cannot run under context_parallel",
            "bias": "attn_bias cannot be used under context_parallel",
            "length": "q must hold this rank's 4 of 8 positions",
            "keys": "k must hold this rank's 4 of 8 positions",
            "cache": "attention_with_kvcache cannot run under context_parallel",
            "shard": "x must hold 8 positions",
            "gather": "x must hold 4 positions",
            "axis": "dim must be an axis of x",
            "no length": "length must be given",
            "dims": "buffer_seq_dims must have 1 entries",
            "other length": "x must hold 5 positions",
            "no axis": "buffer_seq_dims[0] must be an axis of buffers[0], got 4",
            "gradient": "buffers[0] must not require a gradient",
            "mesh": "mesh must be a DeviceMesh or a ProcessGroup, got 2 (int)",
            "axes": "mesh must have one axis",
        }.items():
            assert words in found[name], (name, found.get(name))


def _backward_outside() -> str:
    model = _model(LanguageModelConfig("learnable", **SMALL, checkpointing=True))
    ids, targets = _data(16)
    with context_parallel(dist.group.WORLD, length=16) as sequence:
        total = model(sequence.shard(ids, 1), sequence.shard(targets, 1))
    try:
        total.backward()
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_layer_that_runs_again_outside_is_noticed() -> None:
    for text in ranks.run(2, _backward_outside):
        assert "number of tensors" in text or "metadata" in text


def _compiled(variant: str) -> tuple[list[float], list[Tensor]]:
    torch._dynamo.reset()
    model = _model(LanguageModelConfig(variant, **{**SMALL, "num_layers": 2}))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, targets = _data(32)
    compiled(ids, targets)  # on whole sequences, before
    losses: list[float] = []
    grads: list[Tensor] = []
    for forward in (model, compiled, compiled):
        model.zero_grad()
        with context_parallel(dist.group.WORLD, length=32) as sequence:
            # A context of its own for every step, and one compilation.
            torch._dynamo.config.error_on_recompile = bool(losses[1:])
            loss = forward(sequence.shard(ids, 1), sequence.shard(targets, 1))
            loss.backward()
        losses.append(loss.item())
        grad = model.get_parameter("blocks.0.attention.v_proj.weight").grad
        assert grad is not None
        grads.append(grad.clone())
    torch._dynamo.config.error_on_recompile = False
    return losses, grads


def test_one_graph_takes_a_compiled_model_across_ranks() -> None:
    for losses, grads in ranks.run(2, _compiled, "svformer"):
        assert losses[1:] == [pytest.approx(losses[0], abs=1e-6)] * 2
        for grad in grads[1:]:
            torch.testing.assert_close(grad, grads[0], rtol=1e-5, atol=1e-6)

"""Models under FSDP2 on the ranks of a test, and the same ones whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy

from resformer_kernels.models import LanguageModel
from tests.models.small import SMALL

Named = dict[str, Tensor]

HALVES = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
"""Compute in bfloat16, sum gradients in float32: what most people train with."""

ATTENTION = "value_residual_attention_forward"
"""What the name of attention's forward op contains."""


def keep_attention(_: Any, op: Any, *arguments: Any, **keywords: Any) -> CheckpointPolicy:
    """Keep what attention and matrix products gave, as a policy of torchtitan does."""
    del arguments, keywords
    kept = ATTENTION in str(op) or op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def language_model(variant: str, **changes: Any) -> LanguageModel:
    """A small model with every kind of parameter that the variant may have, the same each time."""
    torch.manual_seed(0)
    kinds = {"stream_scales": True, "exclusive": "learned", "gate": "head"}
    model = LanguageModel(replace(SMALL, variant=variant, **{**kinds, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "lambda" in name or "alpha" in name:
                # Coefficients that differ, so that none passes for another.
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def batch(rows: int = 4, length: int = 12) -> tuple[Tensor, Tensor]:
    """Tokens and the next ones, each (rows, length)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SMALL.vocab_size, (rows, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def part(x: Tensor, ranks: int | None = None, rank: int | None = None) -> Tensor:
    """The rows of x that are a rank's, by default of the rank that calls."""
    ranks = dist.get_world_size() if ranks is None else ranks
    return x.chunk(ranks)[dist.get_rank() if rank is None else rank]


def mesh() -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def shard(
    model: nn.Module,
    layers: Iterable[nn.Module],
    *,
    apart: Iterable[nn.Module] = (),
    **options: Any,
) -> None:
    """Shard every layer, then the rest of the model; modules `apart` in float32, before all."""
    options = {"mesh": mesh(), **options}
    for module in apart:
        fully_shard(module, **{**options, "mp_policy": MixedPrecisionPolicy()})
    for module in (*layers, model):
        fully_shard(module, **options)


def whole(tensors: Mapping[str, Tensor]) -> Named:
    """The tensors without their shards; every rank calls it."""
    return {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in tensors.items()}


def gradients(model: nn.Module) -> Named:
    """Those of every parameter, whole. Raises KeyError where one has none."""
    named = dict(model.named_parameters())
    without = [name for name, parameter in named.items() if parameter.grad is None]
    if without:
        raise KeyError(f"no gradient for {', '.join(without)}")
    return whole({name: p.grad for name, p in named.items() if p.grad is not None})


def assert_same(found: Named, expected: Named, relative: float = 2e-5) -> None:
    """Each tensor's error is at most `relative` of the largest number expected in it."""
    assert found.keys() == expected.keys()
    errors = {
        name: ((found[name] - x).abs().amax() / x.abs().amax().clamp_min(1e-30)).item()
        for name, x in expected.items()
    }
    assert {name: error for name, error in errors.items() if not error <= relative} == {}

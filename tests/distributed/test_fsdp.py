"""FSDP2 on several ranks: each has a part of the batch; gradients are the whole batch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from resformer_kernels.models import VARIANTS
from resformer_kernels.nn import DenseMix, LearnedMix
from tests.distributed import ranks
from tests.distributed.models import (
    HALVES,
    Named,
    assert_same,
    batch,
    gradients,
    language_model,
    mesh,
    part,
    shard,
    whole,
)

all_variants = pytest.mark.parametrize("variant", VARIANTS)

COEFFICIENTS = ("learnable", "learnable-plus", "dense")
"""Variants that learn them."""


def _mean(loss: Tensor) -> Tensor:
    """The mean over the ranks."""
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def _coefficients(model: nn.Module) -> list[nn.Module]:
    """The modules that hold λ and nothing else."""
    return [m for m in model.modules() if isinstance(m, (LearnedMix, DenseMix))]


def _on_ranks(variant: str, changes: dict[str, Any], apart: bool, options: Any) -> Named:
    """The mean loss and every gradient of a sharded model, where each rank has a part."""
    model = language_model(variant, **changes)
    shard(model, model.blocks, apart=_coefficients(model) if apart else (), **options)
    loss = model(*map(part, batch()))
    loss.backward()
    return {"loss": _mean(loss), **gradients(model)}


def _alone(variant: str) -> Named:
    model = language_model(variant)
    loss = model(*batch())
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


def _check(found: list[Named], expected: Named, relative: float = 2e-5) -> None:
    """The first rank's against those expected, and the others' against the first's."""
    assert_same(found[0], expected, relative)
    for other in found[1:]:
        assert all(torch.equal(x, found[0][name]) for name, x in other.items())


@all_variants
def test_gradients_are_those_of_the_whole_batch(variant: str) -> None:
    _check(ranks.run(2, _on_ranks, variant, {}, False, {}), _alone(variant))


def test_parameters_may_be_kept_until_backward() -> None:
    options = {"reshard_after_forward": False}
    changes = {"checkpointing": True}
    found = ranks.run(2, _on_ranks, "learnable", changes, False, options)
    _check(found, _alone("learnable"))


@pytest.mark.parametrize("variant", COEFFICIENTS)
def test_more_ranks_than_a_parameter_has_rows(variant: str) -> None:
    """A coefficient of shape (1,) leaves three of four ranks without a part of it."""
    _check(ranks.run(4, _on_ranks, variant, {}, True, {}), _alone(variant))


@pytest.mark.parametrize(
    ("variant", "apart"), [*((v, False) for v in VARIANTS), *((v, True) for v in COEFFICIENTS)]
)
def test_mixed_precision_computes_what_a_bfloat16_model_does(variant: str, apart: bool) -> None:
    """With the coefficients apart, under a policy of their own, they stay float32."""
    expected: list[Named] = []
    for rank in range(2):
        model = language_model(variant).bfloat16()
        exact = dict(language_model(variant).named_parameters())
        for name, parameter in model.named_parameters():
            if apart and "v_mix.lambda" in name:
                parameter.data = exact[name].data
        loss = model(*(part(x, 2, rank) for x in batch()))
        loss.backward()
        expected.append({"loss": loss.detach(), **gradients(model)})
    mean = {n: (x.float() + expected[1][n].float()) / 2 for n, x in expected[0].items()}
    options = {"mp_policy": HALVES}
    found = ranks.run(2, _on_ranks, variant, {"checkpointing": True}, apart, options)
    _check(found, mean, relative=1e-3)
    assert {x.dtype for x in found[0].values()} == {torch.float32}


def _by_parts(variant: str) -> Named:
    """The same gradients over two micro-batches on a mesh of 2 copies of 2 shards, and the norm
    that they are clipped by."""
    model = language_model(variant)
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    shard(model, model.blocks, mesh=both)
    pieces = list(zip(*(part(x).chunk(2) for x in batch(8)), strict=True))
    for n, (tokens, targets) in enumerate(pieces):
        model.set_requires_gradient_sync(n == len(pieces) - 1)  # type: ignore[operator]
        (model(tokens, targets) / len(pieces)).backward()
    found = gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    return {**found, **whole({"norm": norm}), **_clipped(gradients(model))}


def _clipped(found: Named) -> Named:
    return {f"{name} clipped": gradient for name, gradient in found.items()}


@pytest.mark.parametrize("variant", ["learnable", "dense", "svformer"])
def test_copies_of_shards_micro_batches_and_clipping(variant: str) -> None:
    model = language_model(variant)
    model(*batch(8)).backward()
    expected = {name: x.clone() for name, x in gradients(model).items()}
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    expected |= {"norm": norm, **_clipped(gradients(model))}
    _check(ranks.run(4, _by_parts, variant), expected)


class ThroughDict(nn.Module):
    """What others do: the first block leaves its values in a dict, and later blocks read it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, rotary: Any, tokens: Tensor, shared: dict[str, Tensor]) -> Tensor:
        earlier = (shared["v_first"],) if "v_first" in shared else ()
        x, values, _ = self.block(x, *rotary, tokens, None, *earlier)
        shared.setdefault("v_first", values)
        return x


def _dict_holds_values() -> bool:
    """Whether a dict that a sharded block writes to holds the values afterwards."""
    model = language_model("learnable")
    first = ThroughDict(model.blocks[0])
    fully_shard(first, mesh=mesh(), mp_policy=HALVES)
    shared: dict[str, Tensor] = {}
    tokens, _ = batch()
    first(model.embedding(tokens), model.rotary(tokens.shape[1]), tokens, shared)
    return "v_first" in shared


def test_mixed_precision_drops_what_a_block_leaves_in_a_dict() -> None:
    """Why values are plain arguments and results: FSDP2 hands a block copies of its containers."""
    assert ranks.run(2, _dict_holds_values) == [False, False]

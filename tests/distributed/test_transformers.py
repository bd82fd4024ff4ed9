"""Converted models of transformers under FSDP2: gradients, and what is saved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from tests.distributed import ranks
from tests.distributed.models import (
    HALVES,
    Named,
    assert_same,
    gradients,
    keep_attention,
    part,
    shard,
)
from tests.integrations.tiny import (
    QUIET,
    convert_to_resformer,
    converted,
    logits,
    stock,
    tokens,
)

pytestmark = [*QUIET]

CASES = [
    ("learnable", "sdpa"),
    ("learnable", "resformer"),
    ("svformer", "resformer"),
]


def _loss(model: Any, rows: Tensor) -> Tensor:
    return model(rows, labels=rows, use_cache=False).loss


def _model(variant: str, implementation: str) -> Any:
    model = converted("Llama", variant).train()
    model.set_attn_implementation(implementation)
    return model


def _on_ranks(variant: str, implementation: str, selective: bool, policy: bool) -> Named:
    model = _model(variant, implementation)
    if selective:
        contexts = partial(create_selective_checkpoint_contexts, keep_attention)
        options = {"use_reentrant": False, "context_fn": contexts}
        model.gradient_checkpointing_enable(options)
    precision: dict[str, Any] = {"mp_policy": HALVES} if policy else {}
    shard(model, model.model.layers, **precision)
    _loss(model, part(tokens(4))).backward()
    return gradients(model)


def _alone(variant: str, implementation: str) -> Named:
    model = _model(variant, implementation)
    _loss(model, tokens(4)).backward()
    return gradients(model)


@pytest.mark.parametrize(("variant", "implementation"), CASES)
@pytest.mark.parametrize("selective", [False, True])
def test_gradients_are_those_of_the_whole_batch(
    variant: str, implementation: str, selective: bool
) -> None:
    found = ranks.run(2, _on_ranks, variant, implementation, selective, False)
    assert_same(found[0], _alone(variant, implementation))


@pytest.mark.parametrize("variant", ["learnable", "svformer"])
def test_mixed_precision(variant: str) -> None:
    """What a bfloat16 model computes, with and without checkpoints."""
    expected = []
    for rank in range(2):
        model = _model(variant, "resformer")
        # Not the buffers: the rotary frequencies stay float32.
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        _loss(model, part(tokens(4), 2, rank)).backward()
        expected.append(gradients(model))
    mean = {n: (x.float() + expected[1][n].float()) / 2 for n, x in expected[0].items()}
    for selective in (False, True):
        found = ranks.run(2, _on_ranks, variant, "resformer", selective, True)
        assert_same(found[0], mean, relative=1e-3)


def _tied(variant: str, tied: bool) -> Any:
    return convert_to_resformer(stock("Llama", tie_word_embeddings=tied), variant)


def _step_and_save(variant: str, tied: bool, folder: Path) -> None:
    """Save a sharded model after a step, as trainers do: whole, by the first rank."""
    model = _tied(variant, tied)
    shard(model, model.model.layers)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    _loss(model, part(tokens(4))).backward()
    optimiser.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if state:
        model.save_pretrained(folder, state_dict=state)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("variant", ["learnable", "svformer"])
def test_what_ranks_save_loads_whole(variant: str, tied: bool, tmp_path: Path) -> None:
    """Layers over shared values, and a head that shares its weight, lose nothing."""
    ranks.run(2, _step_and_save, variant, tied, tmp_path)
    model = _tied(variant, tied)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    before = logits(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    _loss(model, tokens(4)).backward()
    optimiser.step()
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(loaded), before, rtol=1e-2)

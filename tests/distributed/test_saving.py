"""Distributed checkpoints: saved on some ranks, loaded on others, and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from resformer_kernels.models import VARIANTS, LanguageModel
from tests.distributed import ranks
from tests.distributed.models import (
    Named,
    assert_same,
    batch,
    gradients,
    language_model,
    part,
    shard,
    whole,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning",
)

KINDS = ("learnable", "learnable-plus", "dense", "svformer", "value-embedding", "fused-kv-lite")
"""The variants whose parameters differ from a plain Transformer's."""

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _model(variant: str) -> LanguageModel:
    return language_model(variant, num_layers=2)


def _other(variant: str) -> LanguageModel:
    """The model with other weights, none of which may remain."""
    model = _model(variant)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    return model


def _optimiser(model: nn.Module) -> torch.optim.Optimizer:
    # An eps well above rounding: a step then depends on no gradient's noise.
    return torch.optim.AdamW(model.parameters(), lr=0.02, eps=1e-3)


def _steps(model: nn.Module, optimiser: torch.optim.Optimizer, steps: range) -> None:
    """Optimiser steps over the batches of these numbers, each rank's part of them."""
    together = dist.is_initialized()
    for step in steps:
        tokens, targets = (x.roll(step, 1) for x in batch())
        loss = model(*map(part, (tokens, targets))) if together else model(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()


def _save(variants: tuple[str, ...], folder: Path) -> None:
    for variant in variants:
        model = _model(variant)
        shard(model, model.blocks)
        optimiser = _optimiser(model)
        _steps(model, optimiser, range(1))
        weights, states = get_state_dict(model, optimiser)
        state_dict_saver.save(
            {"model": weights, "optimiser": states}, checkpoint_id=folder / variant
        )


def _continue(variants: tuple[str, ...], folder: Path) -> list[Named]:
    """Each variant's weights a step later."""
    found = []
    for variant in variants:
        model = _other(variant)
        shard(model, model.blocks)
        optimiser = _optimiser(model)
        weights, states = get_state_dict(model, optimiser)
        state_dict_loader.load(
            {"model": weights, "optimiser": states}, checkpoint_id=folder / variant
        )
        set_state_dict(model, optimiser, model_state_dict=weights, optim_state_dict=states)
        _steps(model, optimiser, range(1, 2))
        found.append(whole(model.state_dict()))
    return found


@pytest.mark.parametrize(
    ("saved", "loaded", "variants"),
    [
        (2, 1, KINDS),
        (1, 2, ("learnable", "dense")),
        (4, 2, ("svformer", "value-embedding")),
    ],
)
def test_training_goes_on_with_other_ranks(
    saved: int, loaded: int, variants: tuple[str, ...], tmp_path: Path
) -> None:
    """With the weights and AdamW's moments that were saved."""
    ranks.run(saved, _save, variants, tmp_path)
    found = ranks.run(loaded, _continue, variants, tmp_path)[0]
    for variant, state in zip(variants, found, strict=True):
        model = _model(variant)
        _steps(model, _optimiser(model), range(2))
        assert_same(state, dict(model.state_dict()), relative=1e-4)


def test_one_process_reads_what_ranks_saved(tmp_path: Path) -> None:
    """Without a process group, into a model that is not sharded."""
    ranks.run(2, _save, ("svformer",), tmp_path)
    model = _other("svformer")
    state = {"model": model.state_dict()}
    state_dict_loader.load(state, checkpoint_id=tmp_path / "svformer", no_dist=True)
    model.load_state_dict(state["model"])
    expected = _model("svformer")
    _steps(expected, _optimiser(expected), range(1))
    assert_same(dict(model.state_dict()), dict(expected.state_dict()), relative=1e-4)


def _whole_state(variants: tuple[str, ...]) -> list[dict[str, Any]]:
    """Each variant's state dict from under every wrapper."""
    found = []
    for variant in variants:
        model = _model(variant)
        for n, block in enumerate(model.blocks):
            wrapper: Any = torch.compile(checkpoint_wrapper(block), backend="eager")
            model.blocks[n] = wrapper
        shard(model, model.blocks)
        found.append(get_model_state_dict(model, options=WHOLE))
    return found


def _from_whole_state(variants: tuple[str, ...], states: list[dict[str, Any]]) -> list[Tensor]:
    """Each variant's logits: sharded on the meta device, then filled from the first rank's."""
    found = []
    for variant, state in zip(variants, states, strict=True):
        with torch.device("meta"):
            model = _model(variant)
        shard(model, model.blocks)
        model.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(model, state if dist.get_rank() == 0 else {}, options=options)
        with torch.no_grad():
            found.append(model(batch()[0]))
    return found


def test_a_whole_state_dict_holds_every_weight_under_its_name() -> None:
    states, others = ranks.run(2, _whole_state, VARIANTS)
    assert others == [{}] * len(VARIANTS)
    logits = ranks.run(2, _from_whole_state, VARIANTS, states)
    for n, (variant, state) in enumerate(zip(VARIANTS, states, strict=True)):
        expected = _model(variant)
        assert state.keys() == expected.state_dict().keys()
        assert all(torch.equal(x, state[name]) for name, x in expected.state_dict().items())
        with torch.no_grad():
            alone = expected(batch()[0])
        for found in logits:
            assert torch.equal(found[n], alone)


def _redrawn(variant: str) -> list[Named]:
    """A sharded model's weights after `reset_parameters`, from the meta device."""
    with torch.device("meta"):
        model = _model(variant)
    shard(model, model.blocks)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    model.reset_parameters()
    model(*map(part, batch())).backward()
    return [whole(model.state_dict()), gradients(model)]


@pytest.mark.parametrize("variant", ["learnable", "value-embedding"])
def test_a_sharded_model_draws_every_weight(variant: str) -> None:
    weights, found = ranks.run(2, _redrawn, variant)[0]
    assert all(x.isfinite().all() for x in (*weights.values(), *found.values()))
    fresh = LanguageModel(_model(variant).config).state_dict()
    for name, x in fresh.items():
        if x.numel() == 1 or not x.std():
            assert torch.equal(weights[name], x), name
        else:
            assert weights[name].std() == pytest.approx(x.std().item(), rel=0.3), name

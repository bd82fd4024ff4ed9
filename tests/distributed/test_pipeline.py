"""A language model in pipeline stages: loss and gradients of the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

from resformer_kernels.distributed.pipeline import pipeline_stage
from resformer_kernels.models import VARIANTS
from tests.distributed import ranks
from tests.distributed.models import Named, assert_same, batch, gradients, language_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)

SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B}


def _model(variant: str, **changes: Any) -> Any:
    return language_model(variant, stream_scales=False, **changes)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _on_ranks(
    variant: str, schedule: str, changes: dict[str, Any], firsts: list[int] | None, folder: Path
) -> Named:
    """This stage's gradients, and in the last stage the loss."""
    rank, world = dist.get_rank(), dist.get_world_size()
    stage = pipeline_stage(_model(variant, **changes), rank, world, first_layers=firsts)
    stages = PipelineStage(stage, rank, world, torch.device("cpu"))
    runs = SCHEDULES[schedule](stages, n_microbatches=max(2, world), loss_fn=_loss)
    tokens, targets = batch()
    losses: list[Tensor] = []
    runs.step(token_ids=tokens, target=targets, losses=losses)
    state_dict_saver.save({"model": stage.state_dict()}, checkpoint_id=folder)
    found = gradients(stage)
    if stage.is_last:
        found["loss"] = torch.stack(losses).mean().detach()
    return found


def _check(world: int, variant: str, schedule: str, folder: Path, **options: Any) -> None:
    changes, firsts = options.get("changes", {}), options.get("firsts")
    model = _model(variant, **changes)
    loss = model(*batch())
    loss.backward()
    parts = ranks.run(world, _on_ranks, variant, schedule, changes, firsts, folder)
    together = {name: x for part in parts for name, x in part.items()}
    assert_same(together, {"loss": loss.detach(), **gradients(model)})
    # What the stages save is the model's checkpoint.
    loaded = {name: torch.zeros_like(x) for name, x in model.state_dict().items()}
    state_dict_loader.load({"model": loaded}, checkpoint_id=folder, no_dist=True)
    assert all(torch.equal(x, loaded[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_stages_compute_what_the_model_does(variant: str, tmp_path: Path) -> None:
    _check(2, variant, "GPipe", tmp_path)


@pytest.mark.parametrize(
    ("variant", "schedule", "options"),
    [
        ("learnable", "1F1B", {"changes": {"checkpointing": True, "embedding_norm": True}}),
        ("dense", "GPipe", {"changes": {"logit_softcap": 5.0}}),
        ("fused-kv-lite", "1F1B", {"changes": {"middle_layer": 0}}),
        ("fused-kv-lite", "GPipe", {"changes": {"middle_layer": 1}}),
    ],
)
def test_four_stages_hand_values_through(
    variant: str, schedule: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """A stage hands on values that it only reads, and keys; and their gradients."""
    _check(4, variant, schedule, tmp_path, **options)


def test_stages_of_a_chosen_size(tmp_path: Path) -> None:
    _check(2, "svformer", "GPipe", tmp_path, firsts=[0, 3])


def test_stages_cover_every_layer_once() -> None:
    model = _model("learnable", num_layers=7)
    for stages in (1, 2, 3, 7):
        parts = [list(pipeline_stage(model, n, stages).layers) for n in range(stages)]
        assert [layer for part in parts for layer in part] == list(range(7))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_bad_input_is_named() -> None:
    model = _model("learnable")
    with pytest.raises(ValueError, match=r"stage must lie in \[0, 1\], got 2"):
        pipeline_stage(model, 2, 2)
    for firsts in ([0], [1, 2], [0, 4], [0, 0], [0, 2, 3]):
        with pytest.raises(ValueError, match="first_layers must be 2 layers of 4, growing from 0"):
            pipeline_stage(model, 0, 2, first_layers=firsts)
    with pytest.raises(ValueError, match="first_layers must be 5 layers of 4"):
        pipeline_stage(model, 0, 5)
    with pytest.raises(ValueError, match="stream_scales must be False in a pipeline"):
        pipeline_stage(language_model("learnable"), 0, 2)

"""Models of transformers under its tensor parallelism: `from_pretrained` with a `tp_size`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from tests.distributed import ranks
from tests.distributed.models import Named, assert_same, gradients, part
from tests.integrations.tiny import (
    QUIET,
    ResFormerCache,
    convert_to_resformer,
    converted,
    families,
    generate,
    left_padded,
    stock,
    tokens,
    transformers,
    version,
)

pytest.importorskip("accelerate", reason="transformers loads onto ranks by accelerate")

pytestmark = [*QUIET]

COEFFICIENTS = {"lambda_v": 0.7, "lambda_first": 0.4}
ROUNDING = 2e-4
"""Of float32, which the large weights of these models amplify."""


def _on_ranks(
    folder: Path, kind: Any = transformers.AutoModelForCausalLM, data: int = 1, **options: Any
) -> Any:
    """The model in a folder, over all ranks, in `data` copies that FSDP2 shards."""
    from transformers.distributed import DistributedConfig

    tp_size = dist.get_world_size() // data
    options["distributed_config"] = DistributedConfig(tp_size=tp_size, fsdp_size=data)
    return kind.from_pretrained(folder, **options).eval()


def _results(model: Any) -> Named:
    """Logits, loss and every gradient."""
    ids = tokens()
    out = model(ids, labels=ids)
    out.loss.backward()
    found = {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients(model)}
    # Softmax does not see a key's bias: its gradient is rounding.
    return {name: x for name, x in found.items() if not name.endswith("k_proj.bias")}


def _generated(model: Any) -> list[Tensor]:
    prompt = {"input_ids": tokens()}
    cache = ResFormerCache(model.config, max_seqlen=32)
    return [
        generate(model, left_padded()),
        generate(model, prompt, past_key_values=cache),
        generate(model, prompt, cache_implementation="static"),
    ]


def _loaded(folder: Path, attention: str, saved: Path) -> tuple[Named, list[Tensor]]:
    model = _on_ranks(folder, attn_implementation=attention)
    assert "v_mix" not in "".join(n for n, p in model.named_parameters() if type(p) is not DTensor)
    found = _results(model)
    model.save_pretrained(saved)
    return found, _generated(model)


@pytest.mark.parametrize(
    ("family", "variant", "attention"),
    [
        ("Llama", "learnable", "resformer"),
        ("Llama", "learnable-plus", "sdpa"),
        ("Llama", "dense", "eager"),
        ("Llama", "svformer", "resformer"),
        ("Qwen2", "learnable", "resformer"),
    ],
)
def test_training_generating_and_saving_are_those_of_one_process(
    family: str, variant: str, attention: str, tmp_path: Path
) -> None:
    model = converted(family, variant)
    model.set_attn_implementation(attention)
    model.save_pretrained(tmp_path / "given")
    expected, sequences = _results(model), _generated(model)
    for found, drawn in ranks.run(2, _loaded, tmp_path / "given", attention, tmp_path / "saved"):
        assert_same(found, expected, ROUNDING)
        assert all(map(torch.equal, drawn, sequences))
    again = type(model).from_pretrained(tmp_path / "saved")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def _in_two_dimensions(folder: Path) -> Named:
    model = _on_ranks(folder, data=2)
    row = part(tokens(), 2, dist.get_rank() // 2)
    model(row, labels=row).loss.backward()
    return gradients(model)


@pytest.mark.skipif(version.installed() < (5, 23), reason="transformers had one of the two")
def test_beside_fsdp(tmp_path: Path) -> None:
    model = converted("Llama")
    model.save_pretrained(tmp_path)
    model(tokens(), labels=tokens()).loss.backward()
    for found in ranks.run(4, _in_two_dimensions, tmp_path):
        assert_same(found, gradients(model), ROUNDING)


def _from_stock(folder: Path, variant: str, coefficients: dict[str, Any]) -> tuple[Named, Any]:
    model = convert_to_resformer(_on_ranks(folder), variant, **coefficients)
    return _results(model), model.tp_plan


@pytest.mark.parametrize(
    ("variant", "coefficients"), [("learnable", COEFFICIENTS), ("svformer", {})]
)
def test_a_parallel_model_is_converted(
    variant: str, coefficients: dict[str, Any], tmp_path: Path
) -> None:
    stock("Llama").save_pretrained(tmp_path)
    expected = _results(convert_to_resformer(stock("Llama"), variant, **coefficients))
    for found, plan in ranks.run(2, _from_stock, tmp_path, variant, coefficients):
        assert_same(found, expected, ROUNDING)
        assert plan["model.layers.*.self_attn.v_mix"] == "resformer_v_mix"


def _initialised(folder: Path) -> Tensor:
    model = _on_ranks(folder, kind=families.ResFormerLlamaForCausalLM)  # type: ignore[attr-defined]
    found: Tensor = model(tokens()).logits.detach()
    return found


def test_a_stock_checkpoint_gets_its_initial_coefficients(tmp_path: Path) -> None:
    stock("Llama").save_pretrained(tmp_path)
    with torch.no_grad():
        made = families.ResFormerLlamaForCausalLM  # type: ignore[attr-defined]
        expected = made.from_pretrained(tmp_path)(tokens()).logits
    for found in ranks.run(2, _initialised, tmp_path):
        assert_same({"logits": found}, {"logits": expected}, ROUNDING)


def _without_a_plan(folder: Path) -> None:
    with pytest.raises(ValueError, match="has no `tp_plan`"):
        _on_ranks(folder, transformers.AutoModelForMaskedLM)


def test_a_family_without_a_plan_is_refused(tmp_path: Path) -> None:
    converted("ModernBert").save_pretrained(tmp_path)
    ranks.run(2, _without_a_plan, tmp_path)


def test_plans_name_the_mix() -> None:
    model = converted("Llama")
    assert model.tp_plan["model.layers.*.self_attn.v_mix"] == "resformer_v_mix"
    assert model.model.tp_plan["layers.*.self_attn.v_mix"] == "resformer_v_mix"
    assert converted("ModernBert").config.base_model_tp_plan is None

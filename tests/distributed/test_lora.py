"""LoRA: what generates is what was trained, and the adapter that is saved holds all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from tests.distributed import ranks
from tests.distributed.models import Named, assert_same, batch, language_model, part, shard
from tests.integrations.tiny import QUIET, ResFormerCache, converted, tokens

peft = pytest.importorskip("peft", reason="needs peft")

pytestmark = [
    *QUIET,
    # peft looks for a config of transformers, to name the base model in the adapter's card.
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]

both = pytest.mark.parametrize("variant", ["learnable", "svformer"])


def _adapted(base: Any) -> Any:
    """A model with LoRA on queries and values, and with coefficients that are trained whole."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["v_mix"],
        init_lora_weights=False,
    )
    return peft.get_peft_model(base, config)


def _base(variant: str, implementation: str = "resformer") -> Any:
    base = converted("Llama", variant)
    base.set_attn_implementation(implementation)
    return base


def _trainable(model: Any) -> Named:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def _step(model: Any, rows: Tensor) -> None:
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(rows, labels=rows, use_cache=False).loss.backward()
    optimiser.step()
    optimiser.zero_grad()


def _generated(model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """A prompt continued greedily, and the logits of each new token."""
    model.eval()
    found = model.generate(
        tokens(),
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return found.sequences, torch.stack(found.logits, 1)


@both
@pytest.mark.parametrize("implementation", ["sdpa", "resformer"])
def test_generation_runs_the_forward_that_was_trained(
    variant: str, implementation: str, tmp_path: Path
) -> None:
    model = _adapted(_base(variant, implementation))
    before = {name: x.clone() for name, x in _trainable(model).items()}
    _step(model, tokens(4))
    changed = [name for name, x in _trainable(model).items() if not torch.equal(x, before[name])]
    assert changed == list(before)
    caches: list[dict[str, Any]] = [{}, {"use_cache": False}, {"cache_implementation": "static"}]
    if implementation == "resformer":
        caches.append({"past_key_values": ResFormerCache(model.config, max_seqlen=24)})
    first, start = tokens(), tokens().shape[1]
    for options in caches:
        sequences, logits = _generated(model, **options)
        assert torch.equal(sequences[:, :start], first)
        # The forward that training runs, gradients and all.
        trained = model.train()(sequences, use_cache=False).logits.detach()
        torch.testing.assert_close(logits, trained[:, start - 1 : -1], rtol=1e-4, atol=1e-4)
    _, expected = _generated(model)
    model.save_pretrained(tmp_path)
    base = _base(variant, implementation)
    _, untrained = _generated(base)
    assert not torch.allclose(untrained, expected, rtol=0.1)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert _trainable(loaded).keys() == before.keys()
    assert all(torch.equal(x, _trainable(model)[n]) for n, x in _trainable(loaded).items())
    assert torch.equal(_generated(loaded)[1], expected)


def _train_sharded(variant: str, folder: Path) -> None:
    model = _adapted(_base(variant))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    shard(model, model.base_model.model.model.layers)
    _step(model, part(tokens(4)))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if state:
        model.save_pretrained(folder, state_dict=state)


@both
def test_ranks_train_and_save_the_same_adapter(variant: str, tmp_path: Path) -> None:
    expected = _adapted(_base(variant))
    _step(expected, tokens(4))
    ranks.run(2, _train_sharded, variant, tmp_path)
    loaded = peft.PeftModel.from_pretrained(_base(variant), tmp_path, is_trainable=True)
    assert_same(_trainable(loaded), _trainable(expected))


@both
def test_a_language_model_writes_what_it_was_trained_for(variant: str, tmp_path: Path) -> None:
    model = _adapted(language_model(variant))
    rows, targets = batch()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(rows, targets).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimiser.step()
    written = model.generate(rows, 8).tokens
    logits = model(torch.cat((rows, written), 1))
    assert torch.equal(logits[:, rows.shape[1] - 1 : -1].argmax(-1), written)
    assert not torch.equal(language_model(variant).generate(rows, 8).tokens, written)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(language_model(variant), tmp_path)
    assert torch.equal(loaded(rows), model(rows))

"""Training converted models: checkpointing, PEFT, the Trainer; and torch.compile."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from tests.integrations.tiny import (
    DECODERS,
    FAMILIES,
    QUIET,
    convert_to_resformer,
    converted,
    left_padded,
    stock,
    tokens,
    transformers,
)

pytestmark = [*QUIET]

all_families = pytest.mark.parametrize("family", FAMILIES)
both_kinds = pytest.mark.parametrize("variant", ["learnable", "dense", "svformer"])


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**left_padded(), labels=tokens(seed=3)).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@all_families
@both_kinds
def test_checkpointing_keeps_every_gradient(family: str, variant: str) -> None:
    model = converted(family, variant).train()
    expected = gradients(model)
    assert all(p.grad is not None for p in model.parameters())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@all_families
def test_reentrant_checkpointing_is_refused(family: str) -> None:
    model = converted(family).train()
    reentrant = {"use_reentrant": True}
    with pytest.raises(ValueError, match="must be non-reentrant, got use_reentrant=True"):
        model.gradient_checkpointing_enable(reentrant)
    with pytest.raises(ValueError, match="use_reentrant=None"):
        model.gradient_checkpointing_enable({"determinism_check": "none"})
    with pytest.raises(ValueError, match="must be non-reentrant"):
        model.base_model.gradient_checkpointing_enable(reentrant)
    assert not model.is_gradient_checkpointing
    # Enabled before the conversion, or by hand.
    source = stock(family)
    source.gradient_checkpointing_enable(reentrant)
    with pytest.raises(ValueError, match="must be non-reentrant"):
        convert_to_resformer(source)
    model.gradient_checkpointing_enable()
    layer = model.base_model.layers[1]
    layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=True)
    with pytest.raises(ValueError, match="must be non-reentrant"):
        model(tokens())
    model.gradient_checkpointing_disable()
    model(tokens())


def sharded(model: Any) -> Any:
    """Every layer, then the rest."""
    mesh = init_device_mesh("cpu", (1,))
    for part in (*model.base_model.layers, model):
        fully_shard(part, mesh=mesh)
    return model


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings(
    # A layer returns its values as a view of its projection; nothing writes to them.
    "ignore:FSDP2-wrapped module .* returned a view tensor",
    "ignore:No device id is provided:UserWarning",
)
@all_families
@pytest.mark.parametrize("variant", ["learnable", "learnable-plus", "dense", "svformer"])
def test_a_fully_sharded_model_has_the_same_gradients(family: str, variant: str) -> None:
    expected = gradients(converted(family, variant))
    found = gradients(sharded(converted(family, variant)))
    whole = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in found.items()}
    torch.testing.assert_close(whole, expected)
    source = stock(family)
    fully_shard(source.base_model.layers[0], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r"layers\[0\] must be a .*got FSDP.*before its layers are"):
        convert_to_resformer(source)


@all_families
def test_a_converted_model_learns(family: str) -> None:
    for variant in ("learnable", "svformer"):
        model = converted(family, variant).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(8):
            loss = model(**left_padded(), labels=tokens(seed=3)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("family", DECODERS)
@both_kinds
def test_lora_trains_and_merges(family: str, variant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    base = converted(family, variant)
    untouched = copy.deepcopy(base)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj", "k_proj", "v_proj"],
        modules_to_save=None if variant == "svformer" else ["v_mix"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(base, config)
    inputs = left_padded()
    before = model(**inputs).logits
    assert not torch.allclose(before, untouched(**inputs).logits)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(**inputs, labels=tokens(seed=3)).loss.backward()
    mixes = [(n, p) for n, p in model.named_parameters() if ".modules_to_save." in n]
    assert len(mixes) == {"learnable": 6, "dense": 3, "svformer": 0}[variant]
    assert all(p.grad is not None and p.grad.any() for _, p in mixes)
    first = model.base_model.model.model.layers[0].self_attn.v_proj.lora_B["default"].weight
    assert first.grad is not None
    assert first.grad.any()
    optimizer.step()
    model.eval()
    model.gradient_checkpointing_disable()
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(untouched, tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    merged = model.merge_and_unload()
    assert type(merged) is type(untouched)
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Qwen2", "ModernBert"])
def test_the_trainer_trains_and_resumes_what_it_saved(family: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate")
    model = converted(family)
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        save_steps=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    start = [p.detach().clone() for n, p in model.named_parameters() if ".v_mix." in n]
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    now = [p for n, p in model.named_parameters() if ".v_mix." in n]
    assert not any(torch.equal(a, b) for a, b in zip(start, now, strict=True))
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-3").eval()
    model.eval()
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("Llama", "sdpa"), ("Qwen2", "resformer"), ("ModernBert", "resformer")],
)
def test_the_forward_compiles_whole(family: str, implementation: str) -> None:
    torch.compiler.reset()
    model = convert_to_resformer(stock(family, num_hidden_layers=2))
    model.set_attn_implementation(implementation)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = left_padded()
    attended = inputs["attention_mask"].bool()
    found = compiled(**inputs, use_cache=False) if family != "ModernBert" else compiled(**inputs)
    expected = model(**inputs)
    torch.testing.assert_close(
        found.logits[attended], expected.logits[attended], rtol=1e-4, atol=2e-4
    )
    found.logits[attended].square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "v_mix" in n)


@pytest.mark.parametrize("implementation", ["sdpa", "resformer"])
def test_decoding_with_a_static_cache_compiles_whole(implementation: str) -> None:
    torch.compiler.reset()
    model = convert_to_resformer(stock("Llama", num_hidden_layers=2), "svformer")
    model.set_attn_implementation(implementation)
    ids = tokens()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(ids).logits
        cache = transformers.StaticCache(model.config, 16)
        model(ids[:, :8], past_key_values=cache)
        for i in range(8, 11):
            found = step(ids[:, i : i + 1], past_key_values=cache).logits[:, 0]
            torch.testing.assert_close(found, expected[:, i], rtol=1e-4, atol=2e-4)

"""The language model under tensor parallelism: what it computes, and what it communicates."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

from resformer_kernels.distributed.plans import tensor_parallel_plan
from resformer_kernels.models import VARIANTS, LanguageModel
from resformer_kernels.nn import RotaryEmbedding, ValueMix
from tests.distributed import ranks
from tests.distributed.models import (
    Named,
    assert_same,
    batch,
    gradients,
    language_model,
    mesh,
    part,
    whole,
)

EVERY_HEAD = {"num_kv_heads": 4}
OTHERWISE: dict[str, Any] = {
    "gate": "channel",
    "exclusive": 1.0,
    "stream_scales": False,
    "mlp": "relu2",
    "embedding_norm": True,
    "logit_softcap": 5.0,
    "qk_norm": False,
    "checkpointing": True,
}
"""What `language_model` leaves out."""


def _split(variant: str, **changes: Any) -> LanguageModel:
    """The model that `language_model` gives, over all ranks."""
    model = language_model(variant, **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # A rule that matches nothing warns.
        parallelize_module(model, mesh(), tensor_parallel_plan(model, mesh()))
    return model


def _results(model: LanguageModel) -> Named:
    """Logits, loss and every gradient."""
    tokens, targets = batch()
    loss = model(tokens, targets)
    loss.backward()
    return {"logits": model(tokens).detach(), "loss": loss.detach(), **gradients(model)}


def _on_ranks(variant: str, changes: dict[str, Any], dtype: torch.dtype) -> Named:
    model = _split(variant, **changes).to(dtype)
    found = _results(model)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        # The embedding's comes whole, from torch's own style.
        if name != "embedding.weight":
            assert isinstance(parameter.grad, DTensor)
            assert parameter.grad.placements == parameter.placements, name
    return found


def _check(world: int, variant: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    expected = _results(language_model(variant, **changes).to(dtype))
    for found in ranks.run(world, _on_ranks, variant, changes, dtype):
        # A coefficient's gradient is a sum that may cancel: float64 tells error from rounding.
        assert_same(found, expected, 1e-10 if dtype is torch.float64 else 2e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_logits_and_gradients_are_those_of_one_process(variant: str) -> None:
    _check(2, variant, {}, torch.float32)


@pytest.mark.parametrize("variant", ["learnable", "value-embedding", "fused-kv-lite"])
def test_other_layers(variant: str) -> None:
    _check(2, variant, OTHERWISE, torch.float64)


@pytest.mark.parametrize("variant", ["learnable", "learnable-plus", "value-embedding"])
def test_four_ranks_that_do_not_divide_the_vocabulary(variant: str) -> None:
    _check(4, variant, EVERY_HEAD, torch.float64)


def _trained(model: LanguageModel) -> Named:
    """Parameters after two steps of two backward passes each."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, foreach=True)
    for _ in range(2):
        for rows in range(2):
            model(*(part(x, 2, rows) for x in batch())).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
    return whole({name: p.detach() for name, p in model.named_parameters()})


def _trained_on_ranks(variant: str) -> Named:
    return _trained(_split(variant))


@pytest.mark.parametrize("variant", ["learnable", "learnable-plus", "dense"])
def test_training_with_one_optimizer(variant: str) -> None:
    expected = _trained(language_model(variant))
    for found in ranks.run(2, _trained_on_ranks, variant):
        assert_same(found, expected)


def _in_two_dimensions(variant: str, apart: bool) -> Named:
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "heads"))
    model = language_model(variant)
    parallelize_module(model, both["heads"], tensor_parallel_plan(model, both["heads"]))
    mixes = [m for m in model.modules() if isinstance(m, ValueMix) and list(m.parameters())]
    for module in (*(mixes if apart else ()), *model.blocks, model):
        fully_shard(module, mesh=both["data"])
    loss = model(*(part(x, 2, both["data"].get_local_rank()) for x in batch()))
    loss.backward()
    mean = loss.detach() / 2
    dist.all_reduce(mean, group=both["data"].get_group())
    return {"loss": mean, **gradients(model)}


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("variant", ["learnable", "learnable-plus", "dense", "value-embedding"])
def test_beside_fsdp(variant: str, apart: bool) -> None:
    expected = _results(language_model(variant))
    del expected["logits"]
    for found in ranks.run(4, _in_two_dimensions, variant, apart):
        assert_same(found, expected)


def _communicated(variant: str) -> list[dict[str, int]]:
    """How often each collective is called: attention, MLP, the whole model; and backward."""
    model = _split(variant)
    tokens, targets = batch()
    x = torch.randn(4, 12, 32, requires_grad=True)
    rotary = RotaryEmbedding(8, 24)(12)
    blocks: Any = model.blocks
    first, block = blocks[0].attention, blocks[-1]
    _, values = first(x, rotary=rotary, token_ids=tokens)
    counts = []

    def count(call: Any) -> Any:
        with warnings.catch_warnings(), CommDebugMode() as mode:
            # The mode sets hooks on modules, some of which return no tensors.
            warnings.simplefilter("ignore")
            result = call()
        counts.append({str(op).split(".")[-1]: n for op, n in mode.get_comm_counts().items()})
        return result

    count(lambda: block.attention(x, values, rotary=rotary, token_ids=tokens))
    count(lambda: block.mlp(x))
    loss = count(lambda: model(tokens, targets))
    count(loss.backward)
    return counts


def test_only_the_sums_of_attention_and_mlp_are_communicated() -> None:
    layers = 4
    for variant, coefficients in (("identity", 0), ("svformer", 0), ("learnable", 2)):
        for attention, mlp, forward, backward in ranks.run(2, _communicated, variant):
            assert attention == mlp == {"all_reduce": 1}
            # The embedding's sum, and the logits.
            assert forward == {"all_reduce": 2 * layers + 1, "all_gather_into_tensor": 1}
            # The gradient of the head's input, and those of coefficients that all heads share.
            assert backward == {"all_reduce": 2 * layers + 1 + coefficients * (layers - 1)}


def _generate(model: LanguageModel) -> list[Tensor]:
    prompts, _ = batch()
    lengths = [3, 12, 5, 7]
    drawn = model.generate(prompts, 6, lengths=lengths, temperature=1.0, seed=3, top_k=20)
    return [model.generate(prompts, 6).tokens, drawn.tokens]


def _generate_on_ranks(variant: str) -> list[Tensor]:
    model = _split(variant).eval()
    assert model.new_cache(1).num_kv_heads == 1
    with pytest.raises(ValueError, match="seed must be an int, so that all ranks"):
        model.generate(batch()[0], 6, temperature=1.0)
    return _generate(model)


@pytest.mark.parametrize("variant", ["learnable", "svformer", "value-embedding", "fused-kv-lite"])
def test_generation(variant: str) -> None:
    expected = _generate(language_model(variant).eval())
    for found in ranks.run(2, _generate_on_ranks, variant):
        assert all(map(torch.equal, found, expected))


def _loss_by_vocabulary() -> Named:
    model = language_model("learnable")
    parallelize_module(model, mesh(), tensor_parallel_plan(model, loss_parallel=True))
    with loss_parallel():
        loss = model(*batch())
        loss.backward()
    return {"loss": loss.detach().full_tensor(), **gradients(model)}


def test_loss_parallel() -> None:
    expected = _results(language_model("learnable"))
    del expected["logits"]
    for found in ranks.run(2, _loss_by_vocabulary):
        assert_same(found, expected)


def _compiled(variant: str) -> Named:
    model = _split(variant)
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    return _results(model)


def test_compiled_layers() -> None:
    # The first one is given the embedding's rows, which were summed over the ranks just before.
    expected = _results(language_model("learnable-plus"))
    for found in ranks.run(2, _compiled, "learnable-plus"):
        assert_same(found, expected)


def _from_meta(variant: str) -> Named:
    state = language_model(variant).state_dict()
    with torch.device("meta"):
        model = language_model(variant)
    parallelize_module(model, mesh(), tensor_parallel_plan(model, mesh()))
    model.to_empty(device="cpu")
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))
    return _results(model)


def test_a_model_of_the_meta_device() -> None:
    expected = _results(language_model("learnable-plus"))
    for found in ranks.run(2, _from_meta, "learnable-plus"):
        assert_same(found, expected)


def _refusals() -> None:
    model = language_model("learnable")
    for changes, message in (
        ({"num_heads": 3, "num_kv_heads": 3, "head_dim": 8}, "num_heads must be a multiple"),
        ({"num_kv_heads": 1}, "num_kv_heads must be a multiple of the mesh's 2 ranks, got 1"),
        ({"mlp_hidden": 47}, "mlp_hidden must be a multiple of the mesh's 2 ranks, got 47"),
    ):
        other = language_model("learnable", **changes)
        with pytest.raises(ValueError, match=message):
            tensor_parallel_plan(other, mesh())
        plan = tensor_parallel_plan(other)
        with pytest.raises(ValueError, match=message):
            parallelize_module(other, mesh(), plan)
        assert not any(isinstance(p, DTensor) for p in other.parameters())
    with pytest.raises(TypeError, match="model must be a LanguageModel, got Block; make the plan"):
        tensor_parallel_plan(model.blocks[0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got 2"):
        tensor_parallel_plan(model, 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mesh must have one dimension, got 2: .*mesh\['tp'\]"):
        tensor_parallel_plan(model, init_device_mesh("cpu", (1, 2)))
    fully_shard(model, mesh=mesh())
    with pytest.raises(ValueError, match=r"stream_scale is a DTensor: apply the plan first"):
        tensor_parallel_plan(model, mesh())


def test_what_a_plan_refuses() -> None:
    ranks.run(2, _refusals)

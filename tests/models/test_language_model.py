"""Every variant: its structure, its gradients, its training, its compositions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from resformer_kernels.models import LanguageModel, parameter_count, with_parameter_budget
from resformer_kernels.nn import EmbeddingMix, FirstValues, FixedMix, OwnValues
from tests.models.small import SMALL, all_epilogues, all_variants


def model(variant: str, **changes: object) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(replace(SMALL, variant=variant, **changes))  # type: ignore[arg-type]


def batch(length: int = 24) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(50, (2, length + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def lambdas(module: LanguageModel) -> dict[str, float]:
    """The mixing parameters' first elements by their names."""
    return {
        name: parameter.flatten()[0].item()
        for name, parameter in module.named_parameters()
        if "lambda" in name
    }


@all_variants
def test_starts_near_the_uniform_loss_and_every_parameter_gets_a_gradient(variant: str) -> None:
    module = model(variant)
    loss = module(*batch())
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(math.log(50), abs=0.1)
    loss.backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@all_epilogues
@pytest.mark.parametrize("variant", ["learnable", "svformer", "fused-kv-lite"])
def test_epilogues_train(variant: str, epilogue: dict[str, object]) -> None:
    """Every parameter gets a gradient, recomputed blocks give the same, and a budget is kept."""
    module = model(variant, **epilogue)
    found = [module(*batch())]
    found += torch.autograd.grad(found[0], list(module.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in found)
    again = model(variant, checkpointing=True, **epilogue)
    loss = again(*batch())
    for a, b in zip(
        found, (loss, *torch.autograd.grad(loss, list(again.parameters()))), strict=True
    ):
        assert torch.equal(a, b)
    config = with_parameter_budget(module.config, 60_000)
    assert abs(parameter_count(config) - 60_000) <= 1.5 * config.dim * config.num_layers


def test_learned_shares_start_at_none() -> None:
    """So that a model is the one without them until training moves them."""
    module, plain = model("learnable", exclusive="learned"), model("learnable")
    plain.load_state_dict(module.state_dict(), strict=False)
    tokens, _ = batch()
    assert torch.equal(module(tokens), plain(tokens))


@all_variants
def test_loss_decreases(variant: str) -> None:
    module = model(variant)
    optimiser = torch.optim.AdamW(module.parameters(), lr=5e-3)
    tokens = torch.arange(25).remainder(7).expand(2, -1)
    first = module(tokens[:, :-1], tokens[:, 1:]).item()
    for _ in range(25):
        loss = module(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss.item() < 0.5 * first


@all_variants
def test_is_causal(variant: str) -> None:
    module = model(variant)
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 15:] = (changed[:, 15:] + 1) % 50
    with torch.no_grad():
        before, after = module(tokens), module(changed)
    torch.testing.assert_close(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


@all_variants
def test_checkpointing_changes_no_gradient(variant: str) -> None:
    found = []
    for checkpointing in (False, True):
        module = model(variant, checkpointing=checkpointing)
        loss = module(*batch())
        found.append(torch.autograd.grad(loss, list(module.parameters())))
    torch.testing.assert_close(found[0], found[1])


# torch's own tracer instantiates an autograd Function, which torch deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@all_variants
def test_compiles_in_one_graph(variant: str) -> None:
    torch.compiler.reset()
    module = model(variant, num_layers=3 if variant == "dense" else 2)
    expected = module(*batch())
    grads = torch.autograd.grad(expected, list(module.parameters()))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    loss = compiled(*batch())
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, list(module.parameters()))
    torch.testing.assert_close(found, grads, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("variant", ["constant", "learnable", "fused-kv-lite"])
def test_compiles_with_dynamic_length_and_checkpointing(variant: str) -> None:
    torch.compiler.reset()
    module = model(variant, num_layers=2, checkpointing=True)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (24, 17):
        expected = torch.autograd.grad(module(*batch(length)), list(module.parameters()))
        got = torch.autograd.grad(compiled(*batch(length)), list(module.parameters()))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_coefficients_have_names_and_first_values() -> None:
    scalars = lambdas(model("learnable"))
    names = [
        f"blocks.{layer}.attention.v_mix.lambda_{which}"
        for layer in (1, 2, 3)
        for which in ("v", "first")
    ]
    assert scalars == dict.fromkeys(names, 0.5)
    assert lambdas(model("learnable-plus")) == scalars
    heads = dict(model("learnable-plus").named_parameters())
    assert heads["blocks.1.attention.v_mix.lambda_v"].shape == (2, 1)
    dense = lambdas(model("dense"))
    assert list(dense.values()) == pytest.approx([1 / 2, 1 / 3, 1 / 4])
    for variant in ("transformer", "identity", "constant", "sparse", "svformer"):
        assert not lambdas(model(variant))


@pytest.mark.parametrize(
    ("variant", "expected"),
    [("identity", (0.5, 0.5)), ("constant", (1.0, 2.0)), ("sparse", (1.0, 5.0))],
)
def test_constants_are_the_papers(variant: str, expected: tuple[float, float]) -> None:
    mixes = [block.attention.v_mix for block in model(variant).blocks]  # type: ignore[union-attr]
    fixed = [mix for mix in mixes if isinstance(mix, FixedMix)]
    assert {(mix.lambda_v, mix.lambda_first) for mix in fixed} == {expected}
    plain = 2 if variant == "sparse" else 1
    assert all(isinstance(mix, OwnValues) for mix in mixes[:plain])
    assert len(fixed) == len(mixes) - plain


def test_svformer_projects_values_once_and_value_embeddings_alternate() -> None:
    projecting = [hasattr(b.attention, "v_proj") for b in model("svformer").blocks]
    assert projecting == [True, False, False, False]
    mixes = [b.attention.v_mix for b in model("svformer").blocks]  # type: ignore[union-attr]
    assert all(isinstance(mix, FirstValues) for mix in mixes[1:])
    mixes = [b.attention.v_mix for b in model("value-embedding").blocks]  # type: ignore[union-attr]
    assert [isinstance(mix, EmbeddingMix) for mix in mixes] == [False, True, False, True]


@pytest.mark.parametrize(("middle", "own"), [(None, 2), (0, 1), (2, 3), (3, 4)])
def test_fused_kv_lite_projects_keys_and_values_up_to_the_middle(
    middle: int | None, own: int
) -> None:
    blocks = model("fused-kv-lite", middle_layer=middle).blocks
    for name in ("k_proj", "v_proj"):
        assert [hasattr(b.attention, name) for b in blocks] == [n < own for n in range(4)]
    mixes = [b.attention.v_mix for b in blocks]  # type: ignore[union-attr]
    assert [type(mix) for mix in mixes] == [OwnValues] * own + [FirstValues] * (4 - own)
    assert all(hasattr(b.attention, "q_proj") for b in blocks)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_upper_layers_of_fused_kv_lite_train_first_values_and_middle_keys(
    checkpointing: bool,
) -> None:
    module = model("fused-kv-lite", checkpointing=checkpointing)
    weights = dict(module.named_parameters())
    with torch.no_grad():
        # The layers with keys and values of their own add nothing to the stream by attention.
        for layer in (0, 1):
            weights[f"blocks.{layer}.attention.o_proj.weight"].zero_()
    module(*batch()).backward()
    names = [f"{layer}.attention.{which}_proj" for layer in (0, 1) for which in "kv"]
    trained = [name for name in names if (weights[f"blocks.{name}.weight"].grad != 0).any()]  # type: ignore[union-attr]
    assert trained == ["0.attention.v_proj", "1.attention.k_proj"]


def test_fused_kv_lite_whose_middle_is_the_last_layer_is_a_transformer() -> None:
    plain, fused = model("transformer"), model("fused-kv-lite", middle_layer=3)
    assert torch.equal(plain(batch()[0]), fused(batch()[0]))


@pytest.mark.parametrize("variant", ["learnable", "svformer", "dense", "fused-kv-lite"])
def test_no_state_is_kept_between_calls(variant: str) -> None:
    module = model(variant)
    before = {name: value for m in module.modules() for name, value in vars(m).items()}
    module(*batch()).backward()
    after = {name: value for m in module.modules() for name, value in vars(m).items()}
    assert before.keys() == after.keys()
    for name, value in after.items():
        assert not isinstance(value, Tensor), name


@all_variants
def test_autocast_trains_in_bfloat16(variant: str) -> None:
    module = model(variant)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module(*batch())
    loss.backward()
    assert loss.item() == pytest.approx(math.log(50), abs=0.15)


@all_variants
def test_parameter_budget_is_met_by_the_mlp(variant: str) -> None:
    # A small vocabulary: the tables of value-embedding alone would exceed the budget.
    base = replace(SMALL, variant="transformer")
    budget = parameter_count(base)
    matched = with_parameter_budget(replace(base, variant=variant), budget)
    count = sum(p.numel() for p in LanguageModel(matched).parameters())
    assert count == parameter_count(matched)
    assert abs(count - budget) <= 3 * SMALL.dim * SMALL.num_layers / 2
    if variant in ("svformer", "fused-kv-lite"):
        assert matched.mlp_hidden is not None
        assert matched.mlp_hidden > base.resolved_mlp_hidden


def test_bad_input_is_named() -> None:
    module = model("learnable")
    with pytest.raises(
        ValueError, match=r"token_ids must be \(B, T\), got a tensor of shape \(3,\)"
    ):
        module(torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="not within max_seqlen 24"):
        module(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match=r"parameters must be at least .* got 10"):
        with_parameter_budget(SMALL, 10)

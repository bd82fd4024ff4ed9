"""Continuous batching: the tokens of `generate`, and more blocks for an SVFormer."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.integrations.tiny import (
    DECODERS,
    QUIET,
    attention_layers,
    block_table,
    convert_to_resformer,
    converted,
    kernel,
    stock,
    tokens,
    transformers,
    version,
)

if version.installed() < version.BATCHING[0]:
    pytest.skip("continuous batching was another before 5.19", allow_module_level=True)

continuous = transformers.generation.continuous_batching
paged_cache = continuous.cache

pytestmark = [*QUIET]

NEW = 20
PAGE = 16


def prompt(length: int) -> list[int]:
    found: list[int] = tokens(1, length, seed=length)[0].tolist()
    return found


def alone(model: Any, ids: list[int]) -> list[int]:
    """New tokens of one prompt by `generate`, with sdpa."""
    model.set_attn_implementation("sdpa")
    found = model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
    new: list[int] = found[0, len(ids) :].tolist()
    return new


def batched(
    model: Any,
    prompts: list[list[int]],
    implementation: str = "resformer",
    num_return_sequences: int = 1,
    **config: Any,
) -> list[list[int]]:
    """New tokens of all prompts by `generate_batch`."""
    model.set_attn_implementation(implementation)
    settings = {"num_blocks": 64, "page_size": PAGE, "max_batch_tokens": 32, **config}
    found = model.generate_batch(
        inputs=prompts,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=NEW,
            # Copies need sampling; of one candidate it is greedy.
            do_sample=num_return_sequences > 1,
            top_k=1,
            eos_token_id=-1,
            pad_token_id=0,
            num_return_sequences=num_return_sequences,
        ),
        continuous_batching_config=transformers.ContinuousBatchingConfig(**settings),
    )
    assert [output.error for output in found.values() if output.error] == []
    # Names are req_0, req_1, ...; copies of a request follow it.
    order = sorted(found, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    assert model.config._attn_implementation == implementation
    return [found[name].generated_tokens for name in order]


def made(config: Any, implementation: str = "sdpa", **settings: Any) -> Any:
    """The cache that continuous batching makes for a config."""
    config._attn_implementation = implementation
    given = {"page_size": PAGE, "max_batch_tokens": 32, "allow_block_sharing": True, **settings}
    given.setdefault("max_memory_percent", 0.01)
    resolved = transformers.ContinuousBatchingConfig(**given)
    one_rank = continuous.distributed.DistributedHelper(None, 10, {})
    return paged_cache.PagedAttentionCache(
        config, resolved, torch.device("cpu"), one_rank, torch.float32
    )


def llama(layers: int = 4, variant: str | None = "svformer") -> Any:
    model = stock("Llama", num_hidden_layers=layers)
    return model if variant is None else convert_to_resformer(model, variant)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("variant", [None, "svformer", "learnable-plus", "dense"])
@pytest.mark.parametrize("implementation", ["sdpa", "resformer"])
def test_tokens_are_those_of_generate(
    family: str, variant: str | None, implementation: str
) -> None:
    """Prompts longer than a batch's tokens come in chunks, beside others that decode."""
    model = stock(family) if variant is None else converted(family, variant)
    prompts = [prompt(length) for length in (1, 5, PAGE, 40, 70)]
    expected = [alone(model, ids) for ids in prompts]
    assert all(len(set(new)) > 2 for new in expected)
    assert batched(model, prompts, implementation) == expected


@pytest.mark.parametrize("implementation", ["sdpa", "paged|eager", "resformer"])
def test_values_are_kept_apart_for_layers_that_own_them(implementation: str) -> None:
    model = convert_to_resformer(stock("Llama", num_hidden_layers=5), "svformer", [2, 4])
    prompts = [prompt(length) for length in (3, 33, 50)]
    assert batched(model, prompts, implementation) == [alone(model, ids) for ids in prompts]


def test_requests_wait_where_blocks_run_out() -> None:
    model = converted("Llama", "svformer")
    prompts = [prompt(length) for length in (30, 31, 32, 33, 34, 35)]
    few = batched(model, prompts, num_blocks=6, max_batch_tokens=64)
    assert few == [alone(model, ids) for ids in prompts]


def test_prompts_share_the_pages_of_their_prefix() -> None:
    model = converted("Llama", "svformer")
    prefix = prompt(3 * PAGE)
    prompts = [[*prefix, *prompt(length)] for length in (4, 9, 20)]
    assert batched(model, prompts, max_batch_tokens=64) == [alone(model, ids) for ids in prompts]


def test_copies_of_a_request_have_blocks_of_their_own() -> None:
    model = converted("Llama", "svformer")
    prompts = [prompt(PAGE + 5)]
    found = batched(model, prompts, num_return_sequences=3)
    assert found == 3 * [alone(model, prompts[0])]


SLIDING: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 24}


@pytest.mark.parametrize("implementation", ["sdpa", "resformer"])
@pytest.mark.parametrize("variant", [None, "svformer", "learnable-plus"])
@pytest.mark.parametrize("full", [0, 2, 4])
def test_rings_keep_values_until_every_layer_has_read_them(
    full: int, variant: str | None, implementation: str
) -> None:
    """Of 4 layers the first `full` keep all tokens, the others a ring of 24."""
    kinds = full * ["full_attention"] + (4 - full) * ["sliding_attention"]
    model = stock("Qwen2", **SLIDING, max_window_layers=full, layer_types=kinds)
    if variant is not None:
        convert_to_resformer(model, variant)
    prompts = [prompt(length) for length in (2, 23, 24, 60, 75)]
    uncached = [_uncached(model, ids) for ids in prompts]
    assert batched(model, prompts, implementation) == uncached


def test_a_window_counts_where_all_tokens_are_kept() -> None:
    kinds = 4 * ["sliding_attention"]
    windowed = stock("Qwen2", **(SLIDING | {"sliding_window": 8}), layer_types=kinds)
    prompts = [prompt(length) for length in (5, 40, 60)]
    expected = [_uncached(windowed, ids) for ids in prompts]
    model = stock("Qwen2")
    assert expected != [_uncached(model, ids) for ids in prompts]
    for layer in attention_layers(model):
        layer.sliding_window = 8
    assert batched(model, prompts) == expected


def _uncached(model: Any, ids: list[int]) -> list[int]:
    model.set_attn_implementation("sdpa")
    found = model.generate(
        torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, use_cache=False
    )
    new: list[int] = found[0, len(ids) :].tolist()
    return new


@pytest.mark.parametrize("family", ["Gemma2", "GptOss"])
def test_caps_and_sinks_are_those_of_the_model(family: str) -> None:
    changes: dict[str, Any] = {"head_dim": 8, "sliding_window": 24}
    if family == "GptOss":
        changes |= {"num_local_experts": 2, "num_experts_per_tok": 2}
    model = stock(family, **changes)
    prompts = [prompt(length) for length in (7, 60)]
    model.set_attn_implementation("eager")
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)[0, len(ids) :]
        for ids in prompts
    ]
    assert batched(model, prompts) == [new.tolist() for new in expected]


@pytest.mark.parametrize(("layers", "blocks"), [(2, 86), (8, 114), (12, 119), (32, 125)])
def test_blocks_in_the_memory_of_64(layers: int, blocks: int) -> None:
    """64 * 2L / (L + 1), rounded up as transformers rounds."""
    assert blocks == -(-64 * 2 * layers // (layers + 1))
    for variant, expected in ((None, 64), ("learnable", 64), ("svformer", blocks)):
        cache = made(llama(layers, variant).config, num_blocks=64)
        assert cache.cache_allocators["full_attention"].num_blocks == expected


def test_blocks_where_some_layers_own_their_values() -> None:
    model = convert_to_resformer(stock("Llama", num_hidden_layers=8), "svformer", [5, 6, 7])
    cache = made(model.config, num_blocks=64)
    allocator = cache.cache_allocators["full_attention"]
    assert allocator.num_blocks == -(-64 * 16 // (8 + 5))
    assert [i for i in range(8) if allocator.appends_values(i)] == [0, 1, 2, 3, 4]


def test_pages_of_a_block_do_not_overlap() -> None:
    cache = made(llama(3).config, num_blocks=4)
    allocator = cache.cache_allocators["full_attention"]
    entry = torch.empty(1, dtype=torch.int32)
    # 3 layers' keys and one V: block 2 begins at page 8 of every view.
    allocator.block_table["a"] = [2]
    allocator.fill_block_table("a", 0, 1, entry)
    assert entry.tolist() == [8]
    views = [allocator.get_cache_for_block_table(layer) for layer in range(3)]
    for i, (keys, _) in enumerate(views):
        keys[8] = i
    views[0][1][8] = 9
    assert [float(keys[8].mean()) for keys, _ in views] == [0, 1, 2]
    assert all(bool((values[8] == 9).all()) for _, values in views)


def test_no_memory_is_planned_for_masks_that_are_not_made() -> None:
    blocks = {
        name: made(llama().config, name, max_batch_tokens=4096, num_blocks=None).num_blocks
        for name in ("sdpa", "resformer", "flash_attention_2")
    }
    assert blocks["resformer"] >= blocks["flash_attention_2"] > blocks["sdpa"]


def test_the_block_table_of_rows() -> None:
    rows = torch.cat([torch.arange(r, r + n) for r, n in ((40, 4), (12, 2), (20, 1), (0, 4))])
    # The first request has tokens on pages 10 and 3, the second on page 5, the third on page 0.
    found = block_table(rows, torch.tensor([0, 6, 7, 11], dtype=torch.int32), 6, 4)
    assert found.dtype is torch.int32
    assert (found[0].tolist(), int(found[1, 0]), int(found[2, 0])) == ([10, 3], 5, 0)


def attend(**kwargs: Any) -> Tensor:
    q = torch.zeros(1, 2, 1, 8)
    out: Tensor = kernel.resformer_attention(torch.nn.Module(), q, q, q, None, **kwargs)[0]
    return out


def test_what_is_not_served_is_named() -> None:
    with pytest.raises(TypeError, match=r"cache must be the PagedAttentionCache .* got \{\}"):
        attend(cache={})
    with pytest.raises(ValueError, match="is_causal must be True in continuous batching"):
        attend(cache={}, is_causal=False)
    with pytest.raises(ValueError, match="position_bias must be None in continuous batching"):
        attend(cache={}, position_bias=torch.zeros(1))
    with pytest.raises(ValueError, match="indices and block_indices must be None"):
        attend(cache={}, indices=torch.zeros(1), block_indices=torch.zeros(1))


def test_other_implementations_are_still_switched_and_refused() -> None:
    model = llama()
    model.set_attn_implementation("eager")
    manager = model.init_continuous_batching(transformers.GenerationConfig(eos_token_id=-1))
    assert manager.model.config._attn_implementation == "paged|eager"
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="not supported for continuous batching"):
        model.init_continuous_batching(transformers.GenerationConfig(eos_token_id=-1))

"""Generation with a cache gives the same tokens as without one, with every option."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from resformer_kernels import SharedValueCache
from resformer_kernels.kvcache.cache import pages
from resformer_kernels.models import Generation, LanguageModel
from resformer_kernels.models.generation import Sampling
from tests.models.small import SMALL, all_epilogues, all_variants

LONGER = replace(SMALL, max_seqlen=40, short_window=6)


def model(variant: str = "svformer", **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    module = LanguageModel(replace(LONGER, variant=variant, **changes))
    with torch.no_grad():
        # Spread the logits for a clear likeliest token, and move gates and λ off their start.
        module.head.weight.mul_(20)
        for name, parameter in module.named_parameters():
            if ("v_mix" in name and "table" not in name) or "epilogue" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return module.eval()


def skip_without_pages(options: dict[str, int]) -> None:
    if options and pages.unavailable_reason() is not None:
        pytest.skip(str(pages.unavailable_reason()))


def prompts(batch: int = 3, length: int = 9) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def without_cache(module: LanguageModel, prompt: Tensor, count: int) -> Tensor:
    """Greedy: (B, count) new tokens, each from a forward over everything before it."""
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat([tokens, module(tokens)[:, -1:].argmax(-1)], dim=1)
    return tokens[:, prompt.shape[1] :]


@all_epilogues
@torch.no_grad()
def test_epilogues_step_by_step(epilogue: dict[str, Any]) -> None:
    for variant in ("learnable", "svformer", "fused-kv-lite"):
        module = model(variant, **epilogue)
        tokens = prompts(2, 20)
        cache = module.new_cache(2)
        found = [
            module.head(module.hidden(piece, cache))
            for piece in tokens.split([7, 1, 1, 5, 1, 1, 4], dim=1)
        ]
        torch.testing.assert_close(torch.cat(found, 1), module(tokens), rtol=1e-4, atol=1e-4)


@all_variants
@torch.no_grad()
def test_step_by_step_equals_the_full_forward(variant: str) -> None:
    module = model(variant)
    tokens = prompts(2, 20)
    expected = module(tokens)
    cache = module.new_cache(2)
    found = []
    for piece in tokens.split([7, 1, 1, 5, 1, 1, 4], dim=1):
        found.append(module.head(module.hidden(piece, cache)))
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-4)
    assert cache.lengths == (20, 20)


@all_variants
def test_greedy_equals_generation_without_a_cache(variant: str) -> None:
    module = model(variant)
    generated = module.generate(prompts(), 12)
    assert torch.equal(generated.tokens, without_cache(module, prompts(), 12))
    assert generated.lengths.tolist() == [12, 12, 12]


@pytest.mark.parametrize("middle", [0, 2, 3])
@torch.no_grad()
def test_any_middle_layer_step_by_step(middle: int) -> None:
    module = model("fused-kv-lite", middle_layer=middle)
    tokens, cache = prompts(2, 12), module.new_cache(2)
    assert cache.keys.shape[0] == cache.values.shape[0] == middle + 1
    pieces = tokens.split([1] * 12, dim=1)
    found = torch.cat([module.head(module.hidden(piece, cache)) for piece in pieces], 1)
    torch.testing.assert_close(found, module(tokens), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["svformer", "learnable", "dense", "fused-kv-lite"])
@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_prompts_of_different_lengths_go_together(variant: str, chunk: int | None) -> None:
    module = model(variant)
    prompt, lengths = prompts(), [4, 9, 1]
    together = module.generate(prompt, 8, lengths=lengths, prefill_chunk=chunk)
    for row, length in enumerate(lengths):
        alone = without_cache(module, prompt[row : row + 1, :length], 8)
        assert torch.equal(together.tokens[row], alone[0])


@pytest.mark.parametrize("variant", ["learnable", "fused-kv-lite"])
@pytest.mark.parametrize("options", [{}, {"num_pages": 60, "page_size": 4}])
def test_a_cache_is_continued(variant: str, options: dict[str, int]) -> None:
    skip_without_pages(options)
    module = model(variant)
    cache = module.new_cache(3, **options)
    first = module.generate(prompts(), 5, lengths=[9, 5, 9], cache=cache)
    assert cache.lengths == (13, 9, 13)
    more = torch.cat([first.tokens[:, -1:], prompts(3, 3)], dim=1)
    second = module.generate(more, 6, cache=cache)
    for row, length in enumerate([9, 5, 9]):
        whole = torch.cat([prompts()[row, :length], first.tokens[row], prompts(3, 3)[row]])
        assert torch.equal(second.tokens[row], without_cache(module, whole[None], 6)[0])


@torch.no_grad()
def beams(module: LanguageModel, cache: SharedValueCache | None) -> Tensor:
    """The tokens of three beams, best first; from a cache, or a forward over everything."""
    tokens = prompts(1).expand(3, -1)
    scores = torch.tensor([0.0, -torch.inf, -torch.inf])
    hidden = module.hidden(tokens, cache)[:, -1]
    for _ in range(10):
        totals = (scores[:, None] + module.head(hidden).log_softmax(-1)).flatten()
        scores, best = totals.topk(3)
        picks, new = best // 50, best % 50
        tokens = torch.cat([tokens[picks], new[:, None]], dim=1)
        if cache is not None:
            cache.reorder(picks)
        hidden = module.hidden(tokens if cache is None else new[:, None], cache)[:, -1]
    return tokens


@pytest.mark.parametrize("variant", ["svformer", "learnable", "fused-kv-lite"])
@pytest.mark.parametrize("options", [{}, {"num_pages": 40, "page_size": 4}])
def test_beam_search_over_a_cache(variant: str, options: dict[str, int]) -> None:
    skip_without_pages(options)
    module = model(variant)
    assert torch.equal(beams(module, module.new_cache(3, **options)), beams(module, None))


@pytest.mark.parametrize("variant", ["svformer", "fused-kv-lite"])
def test_int8_cache_generates(variant: str) -> None:
    module = model(variant)
    exact = module.generate(prompts(), 8)
    coarse = module.generate(prompts(), 8, cache=module.new_cache(3, dtype=torch.int8))
    assert (exact.tokens == coarse.tokens).float().mean() > 0.5


def test_rows_stop_on_their_own() -> None:
    module = model("svformer")
    free = module.generate(prompts(), 12).tokens
    stop = int(free[0, 3])
    cache = module.new_cache(3)
    stopped = module.generate(prompts(), 12, stop_token=stop, cache=cache)
    for row, (tokens, length) in enumerate(zip(*stopped, strict=True)):
        found = (free[row] == stop).nonzero()
        expected = int(found[0]) + 1 if len(found) else 12
        assert length == expected
        assert torch.equal(tokens[:expected], free[row, :expected])
        assert (tokens[expected:] == stop).all()
        assert cache.lengths[row] == 9 + expected - 1


def test_generation_ends_when_all_rows_have() -> None:
    module = model("svformer")
    prompt = prompts(1)
    stop = int(module.generate(prompt, 3).tokens[0, 2])
    stopped = module.generate(prompt, 30, stop_token=stop)
    assert stopped.tokens.shape[1] <= 3


def test_a_seed_repeats_and_temperature_draws() -> None:
    module = model("learnable")
    options: dict[str, Any] = {"temperature": 1.5, "top_k": 20, "top_p": 0.95}
    one, other = (module.generate(prompts(), 10, seed=3, **options) for _ in range(2))
    assert torch.equal(one.tokens, other.tokens)
    assert not torch.equal(one.tokens, module.generate(prompts(), 10, seed=4, **options).tokens)
    greedy = module.generate(prompts(), 10).tokens
    for options in ({"top_k": 1}, {"top_p": 1e-6}):
        assert torch.equal(
            module.generate(prompts(), 10, temperature=1.0, **options).tokens, greedy
        )


def test_top_k_and_top_p_keep_what_they_should() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    shares = Sampling(1.0, top_k=2).probabilities(logits)
    torch.testing.assert_close(shares, torch.tensor([[2 / 3, 1 / 3, 0.0, 0.0]]))
    # 0.5 alone is below 0.6; with 0.25 the sum exceeds it.
    shares = Sampling(1.0, top_p=0.6).probabilities(logits)
    torch.testing.assert_close(shares, torch.tensor([[2 / 3, 1 / 3, 0.0, 0.0]]))
    torch.testing.assert_close(Sampling(1.0, top_p=1.0).probabilities(logits), logits.exp())
    cold = Sampling(0.5).probabilities(logits)
    torch.testing.assert_close(cold, logits.exp() ** 2 / (logits.exp() ** 2).sum())
    drawn = Sampling(1.0, top_k=2).draw(logits.expand(4000, 4), torch.Generator().manual_seed(0))
    assert float((drawn == 0).float().mean()) == pytest.approx(2 / 3, abs=0.03)


def test_cache_bytes_are_svformers_share() -> None:
    standard, shared = (model(variant).new_cache(2) for variant in ("learnable", "svformer"))
    assert shared.nbytes * 2 * SMALL.num_layers == standard.nbytes * (SMALL.num_layers + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_cache_bytes_are_half_in_fused_kv_lite(dtype: torch.dtype) -> None:
    standard, fused = (
        model(variant).new_cache(2, dtype=dtype) for variant in ("transformer", "fused-kv-lite")
    )
    assert fused.nbytes * 2 == standard.nbytes


@all_variants
@torch.no_grad()
def test_a_layer_that_raises_leaves_the_cache_as_it_was(variant: str) -> None:
    module = model(variant)
    cache = module.new_cache(3)
    module.hidden(prompts(), cache)
    expected = module.hidden(prompts(3, 1), cache)
    cache.crop(9)

    def raises(*_: object) -> None:
        raise RuntimeError("out of memory")

    last = module.blocks[-1].register_forward_hook(raises)
    with pytest.raises(RuntimeError, match="out of memory"):
        module.hidden(prompts(3, 4), cache)
    last.remove()
    assert cache.lengths == (9, 9, 9)
    assert torch.equal(module.hidden(prompts(3, 1), cache), expected)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"temperature": -1.0}, ValueError, "temperature must be 0 .greedy. or more, got -1.0"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"top_p": 1.5}, ValueError, "top_p must be above 0 and at most 1, got 1.5"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 33}, ValueError, "41 tokens would be read, .* max_seqlen is 40"),
        ({"lengths": [9, 9]}, ValueError, "lengths must be 3 numbers of 1 to 9"),
        ({"lengths": [9, 9, 0]}, ValueError, "lengths must be 3 numbers of 1 to 9"),
        ({"prefill_chunk": 0}, ValueError, "prefill_chunk must be at least 1, got 0"),
        ({"token_ids": prompts()[0]}, ValueError, r"token_ids must be \(B, T\)"),
        ({"token_ids": prompts().float()}, TypeError, "token_ids must be int64 or int32, got"),
        ({"token_ids": prompts()[:, :0]}, ValueError, "token_ids must hold a token"),
        ({"token_ids": prompts(2)}, ValueError, "cache must hold token_ids' 2 sequences, got 3"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], said: str) -> None:
    module = model()
    arguments: dict[str, Any] = {"token_ids": prompts(), "max_new_tokens": 2, **options}
    with pytest.raises(error, match=said):
        module.generate(cache=module.new_cache(3), **arguments)


def test_a_full_cache_is_left_as_it_was() -> None:
    module = model()
    cache = module.new_cache(3, 12)
    module.generate(prompts(3, 4), 2, cache=cache)
    with pytest.raises(RuntimeError, match="the cache is full"):
        module.generate(prompts(3, 4), 10, cache=cache)
    assert cache.lengths == (5, 5, 5)


def test_gradients_are_refused_and_nothing_is_cached() -> None:
    module = model()
    cache = module.new_cache(3)
    with pytest.raises(RuntimeError, match="k requires a gradient"):
        module.hidden(prompts(), cache)
    assert cache.lengths == (0, 0, 0)
    with torch.no_grad():
        module.hidden(prompts(), cache)


def test_the_result_has_names() -> None:
    assert Generation._fields == ("tokens", "lengths")

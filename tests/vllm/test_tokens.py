"""Tokens of vLLM, greedy in float32, are those of transformers: prompts in chunks, mixed batches,
pages found again, requests preempted, drafts, several processes, compiled."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.vllm.process import ROUNDS, Answer, Engines
from tests.vllm.tiny import HEAD_DIM, KV_HEADS, LAYERS, MODELS, PROMPTS, Saved

MEMORY = 32 << 20


@pytest.fixture(scope="session")
def eager(engines: Engines) -> dict[str, Answer]:
    """Every model in one process, by name, and some under other conditions."""
    # The first four requests fit when they come, and not as they grow.
    few_pages = {"num_gpu_blocks_override": 18, "block_size": 16, "enable_prefix_caching": False}
    jobs: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in MODELS}
    jobs["preempted"] = ("svformer", few_pages)
    jobs["float8"] = ("svformer", {"kv_cache_dtype": "fp8"})
    answers, _ = engines.run(jobs)
    return answers


def equal(answer: Answer, saved: Saved) -> None:
    """Assert that an engine appended transformers' tokens in every round."""
    assert answer.error == ""
    for tokens in answer.tokens:
        pairs = zip(PROMPTS, tokens, saved.tokens, strict=True)
        # A comparison of the lists whole would have pytest look for their difference for minutes.
        assert [length for length, got, expected in pairs if got != expected] == []
    assert len(answer.tokens) == ROUNDS


def test_models_differ(models: dict[str, Saved]) -> None:
    """Tokens tell variants apart, and a window from none, so that equality means something."""
    assert len({str(saved.tokens) for saved in models.values()}) == len(MODELS)
    windowed = models["svformer with a window"].tokens
    assert windowed[4] != models["svformer of Qwen2"].tokens[4]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_equal(name: str, eager: dict[str, Answer], models: dict[str, Saved]) -> None:
    answer = eager[name]
    equal(answer, models[name])
    assert answer.cached[0] == [0] * len(PROMPTS)
    size = answer.block_size
    assert answer.cached[1] == [(length - 1) // size * size for length in PROMPTS]
    assert max(answer.cached[1]) > 0


def test_preempted_requests(eager: dict[str, Answer], models: dict[str, Saved]) -> None:
    answer = eager["preempted"]
    assert answer.metrics["vllm:num_preemptions"] > 0
    equal(answer, models["svformer"])


def test_speculation(engines: Engines, models: dict[str, Saved]) -> None:
    drafts = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    answers, _ = engines.run({"drafts": ("svformer", {"speculative_config": drafts})})
    equal(answers["drafts"], models["svformer"])
    metrics = answers["drafts"].metrics
    accepted = metrics["vllm:spec_decode_num_accepted_tokens"]
    assert 0 < accepted < metrics["vllm:spec_decode_num_draft_tokens"]


def blocks(layers_of_keys_or_values: int) -> int:
    """Pages of 128 tokens of a model that keeps so many K and V, in all, in `MEMORY`."""
    return MEMORY // (layers_of_keys_or_values * 128 * KV_HEADS * HEAD_DIM * 4)


def test_blocks_in_the_same_memory(eager: dict[str, Answer]) -> None:
    llama, svformer = eager["llama"], eager["svformer"]
    assert llama.block_size == svformer.block_size == 128
    assert llama.blocks == blocks(2 * LAYERS)
    assert svformer.blocks == blocks(LAYERS + 1) == llama.blocks * 2 * LAYERS // (LAYERS + 1)
    # Layers 0 and 1 keep values of their own.
    assert eager["svformer of two layers"].blocks == blocks(LAYERS + 2)
    assert eager["learnable"].blocks == llama.blocks


def test_caches_of_other_dtypes_are_refused(eager: dict[str, Answer]) -> None:
    assert "cache must have the model's dtype" in eager["float8"].error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svformer with one KV head", "learnable-plus"])
def test_tensor_parallelism(name: str, engines: Engines, models: dict[str, Saved]) -> None:
    """One KV head is on both ranks; of two, and of their coefficients, each rank has its own."""
    processors = sorted(os.sched_getaffinity(0))
    bind = f"{processors[0]}|{processors[-1]}"
    answers, _ = engines.run(
        {name: (name, {"tensor_parallel_size": 2})}, VLLM_CPU_OMP_THREADS_BIND=bind
    )
    equal(answers[name], models[name])


@pytest.mark.slow
def test_compiled(engines: Engines, models: dict[str, Saved]) -> None:
    answers, _ = engines.run({"compiled": ("svformer", {"enforce_eager": False})})
    equal(answers["compiled"], models["svformer"])

"""Nothing in the batch, no tokens, no heads, no channels: empty results and gradients, no error."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resformer_kernels import (
    KVLayout,
    SharedValueCache,
    attention_with_kvcache,
    linear_scan,
    mix_value_embedding,
    mix_values,
    reservoir_scan,
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels.models import (
    VARIANTS,
    LanguageModel,
    LanguageModelConfig,
    ReservoirClassifier,
    SentenceEncoder,
    byte_tokens,
)
from resformer_kernels.nn import Reservoir, ReservoirMemory


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a CPU."""
    name: str = request.param
    if name != "reference":
        request.getfixturevalue("native" if name == "native" else "interpreter")
    return name


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def offsets(sequences: int, total: int) -> Tensor:
    """One sequence has all the tokens."""
    return torch.tensor([0, *([total] * sequences)], dtype=torch.int32)


def assert_empty_gradients(outputs: Any, leaves: list[Tensor]) -> None:
    """Every leaf has a gradient, and nothing is NaN."""
    floats = [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]
    assert all(not x.isnan().any() for x in floats)
    loss = torch.stack([x.masked_fill(x == -torch.inf, 0).sum() for x in floats]).sum()
    for one, found in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        assert found.shape == one.shape
        assert found.isfinite().all()


SIZES = [*product((0, 2), (0, 3), (0, 3))]


@pytest.mark.parametrize(("batch", "queries", "keys"), SIZES)
@pytest.mark.parametrize("causal", [False, True])
def test_attention(batch: int, queries: int, keys: int, causal: bool, backend: str) -> None:
    q, k = leaf(batch, queries, 4, 8), leaf(batch, keys, 2, 8)
    v, v_first, own = leaf(batch, keys, 2, 6), leaf(batch, keys, 2, 6), leaf(2, 1)
    sinks, bias = leaf(4), leaf(1, 1, queries, keys)
    outputs = value_residual_attention(
        q, k, v, v_first, own, 0.5, causal=causal, sinks=sinks, attn_bias=bias, return_lse=True,
        return_mixed_value=True, backend=backend,
    )  # fmt: skip
    assert outputs[0].shape == (batch, queries, 4, 6)
    assert_empty_gradients(outputs, [q, k, v, v_first, own, sinks, bias])


@pytest.mark.parametrize(("sequences", "queries", "keys"), SIZES)
def test_packed_attention(sequences: int, queries: int, keys: int, backend: str) -> None:
    leaves = [leaf(queries, 2, 8), leaf(keys, 2, 8), leaf(keys, 2, 8)]
    out = value_residual_attention_varlen(
        *leaves, cu_seqlens_q=offsets(sequences, queries), cu_seqlens_k=offsets(sequences, keys),
        max_seqlen_q=queries, max_seqlen_k=keys, backend=backend,
    )  # fmt: skip
    assert_empty_gradients(out, leaves)


@pytest.mark.parametrize(("batch", "queries", "capacity"), SIZES)
@pytest.mark.parametrize("new", [None, 0, 1])
def test_cached_attention(
    batch: int, queries: int, capacity: int, new: int | None, backend: str
) -> None:
    if new and not capacity:
        pytest.skip("there is no room")
    cache = torch.zeros(batch, capacity, 2, 8)
    k = None if new is None else torch.randn(batch, new, 2, 8)
    for lengths in (0, torch.zeros(batch, dtype=torch.int32)):
        out, lse = attention_with_kvcache(
            torch.randn(batch, queries, 4, 8), cache, cache.clone(), k, k, cache_seqlens=lengths,
            return_lse=True, backend=backend,
        )  # fmt: skip
        assert out.shape == (batch, queries, 4, 8)
        assert not lse.isnan().any()
    paged = torch.zeros(capacity, 4, 2, 8)
    table = torch.zeros(batch, min(1, capacity), dtype=torch.int32)
    out = attention_with_kvcache(
        torch.randn(batch, queries, 4, 8), paged, paged.clone(), cache_seqlens=0,
        block_table=table, backend=backend,
    )  # fmt: skip
    assert not out.any()


SHAPES = [*product((0, 2), (0, 3), (0, 2), (0, 5)), *product((0, 3), (0, 2), (0, 5))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixes(shape: tuple[int, ...], backend: str) -> None:
    a, b, first = leaf(*shape), leaf(*shape), leaf(shape[-2], 1)
    assert_empty_gradients(mix_values([a, b], [first, 0.5], backend=backend), [a, b, first])
    table, gate = leaf(4, *shape[-2:]), leaf(shape[-2], 1)
    ids = torch.zeros(shape[:-2], dtype=torch.int64)
    for sparse in (False, True):
        out = mix_value_embedding(a, table, ids, gate, sparse_grad=sparse, backend=backend)
        found = torch.autograd.grad(out.sum(), [a, table, gate])
        assert [x.shape for x in found] == [a.shape, table.shape, gate.shape]


@pytest.mark.parametrize(("batch", "steps", "channels"), [*product((0, 2), (0, 3), (0, 4))])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_scans(
    batch: int, steps: int, channels: int, constant: bool, reverse: bool, backend: str
) -> None:
    for packed in (False, True):
        shape = (steps, channels) if packed else (batch, steps, channels)
        tokens, initial = leaf(*shape), leaf(batch, channels)
        gates = leaf(channels) if constant else leaf(*shape)
        outputs = linear_scan(
            gates, tokens, initial, reverse=reverse, backend=backend,
            cu_seqlens=offsets(batch, steps) if packed else None,
        )  # fmt: skip
        assert_empty_gradients(outputs, [gates, tokens, initial])


@pytest.mark.parametrize(("batch", "steps"), [*product((0, 2), (0, 3))])
@pytest.mark.parametrize("reduce", ["none", "last", "mean", "gram"])
@pytest.mark.parametrize("mode", ["sequential", "chunked"])
def test_reservoirs(batch: int, steps: int, reduce: str, mode: str, backend: str) -> None:
    for packed in (False, True):
        inputs = leaf(steps, 3) if packed else leaf(batch, steps, 3)
        leaves = [leaf(4, 4), leaf(4, 3), leaf(4), leaf(batch, 4)]
        weight, input_weight, bias, initial = leaves
        outputs = reservoir_scan(
            inputs, weight, input_weight=input_weight, bias=bias, initial_state=initial,
            cu_seqlens=offsets(batch, steps) if packed else None, reduce=reduce, mode=mode,
            targets=torch.randn(*inputs.shape[:-1], 2) if reduce == "gram" else None,
            backend=backend,
        )  # fmt: skip
        assert_empty_gradients(outputs, [inputs, *leaves])


def test_a_cache_of_no_sequences(native: str) -> None:
    sizes: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 8, "max_seqlen": 5}
    layout = KVLayout.svformer(2)
    for cache in (
        SharedValueCache(layout, batch=0, **sizes),
        SharedValueCache(layout, num_pages=0, page_size=2, **sizes),
        SharedValueCache(layout, num_pages=3, page_size=2, batch=0, **sizes),
    ):
        x = torch.zeros(0, 1, 2, 8)
        assert cache.attend(0, x, x, x, backend=native).shape == x.shape
        cache.append(1, x)
        assert cache.read(0)[0].shape == (0, 0, 2, 8)
        cache.crop(0)
        assert cache.reorder([]) == cache.sequences == ()
        assert (cache.lengths, cache.utilisation) == ((), 0.0)


CONFIG = LanguageModelConfig(
    vocab_size=16, dim=16, num_layers=2, num_heads=2, max_seqlen=32, gate_channels=4
)
NOTHING = torch.zeros(0, 5, dtype=torch.int64)


def language_model(variant: str) -> LanguageModel:
    return LanguageModel(LanguageModelConfig(**{**vars(CONFIG), "variant": variant}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_language_models(variant: str) -> None:
    model = language_model(variant)
    for shape in ((0, 5), (2, 0), (0, 0)):
        logits = model(torch.zeros(shape, dtype=torch.int64))
        assert logits.shape == (*shape, 16)
        (gradient,) = torch.autograd.grad(logits.sum(), model.embedding.weight)
        assert not gradient.any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lengths": []},
        {"lengths": torch.tensor([])},
        {"temperature": 1.0, "top_k": 3, "top_p": 0.5, "seed": 1},
        {"stop_token": 3},
        {"prefill_chunk": 2},
        {"cache": "contiguous"},
        {"cache": "paged"},
    ],
    ids=str,
)
def test_generation(options: dict[str, Any], native: str) -> None:
    del native
    model = language_model("svformer")
    if options.get("cache"):
        form = {"num_pages": 3, "page_size": 2} if options["cache"] == "paged" else {}
        options = {"cache": model.new_cache(0, 9, **form)}
    for prompts in (NOTHING, NOTHING[:, :0]):
        drawn = model.generate(prompts, 3, **options)
        assert drawn.tokens.shape[0] == drawn.lengths.shape[0] == 0
        assert drawn.tokens.dtype is drawn.lengths.dtype is torch.int64
    with pytest.raises(ValueError, match="cache must hold token_ids' 0 sequences, got 2"):
        model.generate(NOTHING, 3, cache=model.new_cache(2))


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (2, 0)], ids=str)
def test_token_ids_of_an_empty_list_are_floats(shape: tuple[int, int]) -> None:
    model, encoder = language_model("svformer"), SentenceEncoder(CONFIG)
    calls: tuple[Callable[[Tensor], Any], ...] = (model, model.hidden, encoder)
    for call in (*calls, lambda ids: model.generate(ids, 3)):
        with pytest.raises(TypeError, match=r"got torch.float32: torch.tensor of an empty list is"):
            call(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"token_ids must be \(.*\), got a tensor of shape"):
            call(torch.tensor([]))


def test_sentences() -> None:
    encoder = SentenceEncoder(CONFIG, 3)
    assert encoder(byte_tokens([])).shape == (0, 3)
    assert encoder(NOTHING).shape == (0, 3)
    assert encoder(byte_tokens(["", ""])).isfinite().all()


@pytest.mark.parametrize(("batch", "steps"), [(0, 4), (2, 0), (0, 0)])
def test_conversations(batch: int, steps: int) -> None:
    reservoir = Reservoir(6, 5, rc_connectivity=1.0)
    memories = (
        ReservoirMemory(reservoir, 4, stateful=True),
        ReservoirMemory(reservoir, 4, readout="attention", window=2, heads=2, streams=2),
    )
    model = ReservoirClassifier(3, encoder=nn.Identity(), features=5, memories=memories)
    utterances, streams = leaf(batch, steps, 5), torch.zeros(batch, steps, dtype=torch.int64)
    logits = model(utterances, streams=streams)
    assert logits.shape == (batch, steps, 3)
    assert_empty_gradients(logits, [utterances])
    lengths = torch.zeros(batch, dtype=torch.int64)
    assert model(utterances, streams=streams, lengths=lengths).shape == (batch, steps, 3)

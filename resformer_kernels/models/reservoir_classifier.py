"""A sentence encoder, reservoirs over everything before the sentence, and a classifier."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resformer_kernels._core.checks import integer, real
from resformer_kernels.models.config import LanguageModelConfig
from resformer_kernels.models.sentence_encoder import SentenceEncoder
from resformer_kernels.nn import ReservoirMemory


def default_encoder(out_features: int = 128) -> SentenceEncoder:
    """The small Transformer of this package over bytes (see `byte_tokens`)."""
    config = LanguageModelConfig(
        variant="learnable", vocab_size=257, dim=128, num_layers=2, num_heads=4, max_seqlen=256
    )
    return SentenceEncoder(config, out_features)


class ReservoirClassifier(nn.Module):
    """Label each utterance of a conversation, given all earlier ones.

    The cascade of Liu and Xu, arXiv 2509.24074: an encoder reads the current utterance, fixed
    reservoirs hold a state driven by every earlier one, a nonlinear readout maps these states to
    features, and the classifier sees both,

        e_t = encoder(utterance t)
        m_t = [readout_i(h^i_{t-1})]_i,   h^i_t = reservoir_i(h^i_{t-1}, heard_t)
        logits_t = W_2 drop(relu(W_x drop(e_t, extra_t) + Σ_i W_i m^i_t))

    (the paper gives no equations; these follow its text). Memory and time per step do not depend on
    the length of the history. Without memories each utterance is classified on its own.

    Args:
        classes: number of labels.
        encoder: any module from a batch of utterances (n, ...) to (n, features); None:
            `default_encoder()`. Pass `nn.Identity()` for precomputed vectors.
        features: length of the encoder's vectors; None: encoder.out_features.
        memories: `ReservoirMemory` modules; their out_features can differ.
        hidden: units of the hidden layer.
        extra_features: length of further features of the utterance, such as its speaker.
        dropout, input_dropout: dropout of the hidden layer and of its input.

    Raises:
        TypeError, ValueError: a size that is no integer or too small, or features is None and the
            encoder has no out_features.
    """

    def __init__(
        self,
        classes: int,
        *,
        encoder: nn.Module | None = None,
        features: int | None = None,
        memories: Sequence[ReservoirMemory] = (),
        hidden: int = 128,
        extra_features: int = 0,
        dropout: float = 0.5,
        input_dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.encoder = default_encoder() if encoder is None else encoder
        found = getattr(self.encoder, "out_features", None) if features is None else features
        if found is None:
            raise ValueError("features must be given: the encoder has no out_features, got None")
        self.features, self.classes = integer("features", found, 1), integer("classes", classes, 1)
        self.extra_features = integer("extra_features", extra_features, 0)
        hidden = integer("hidden", hidden, 1)
        self.memories = nn.ModuleList(memories)
        self.from_utterance = nn.Linear(self.features + self.extra_features, hidden)
        self.from_memory = nn.ModuleList(
            nn.Linear(memory.out_features, hidden, bias=False) for memory in memories
        )
        self.input_dropout = nn.Dropout(real("input_dropout", input_dropout))
        self.dropout = nn.Dropout(real("dropout", dropout))
        self.output = nn.Linear(hidden, self.classes)

    def forward(
        self,
        utterances: Tensor,
        *,
        extra: Tensor | None = None,
        heard: Tensor | None = None,
        streams: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The logits of every utterance.

        Args:
            utterances: (B, T, ...): B conversations of T utterances, as the encoder takes them.
            extra: (B, T, extra_features).
            heard: the reservoirs' input, (B, T, input_dim); None: the encoder's vectors.
            streams: int64 (B, T), each utterance's stream, for memories with several streams.
            lengths: int64 (B,), utterances of each conversation without padding; None: all T.

        Returns:
            (B, T, classes). Logits of padding are meaningless.

        Raises:
            ValueError: a wrong shape.
        """
        batch, steps = utterances.shape[:2]
        encoded = self.encoder(utterances.flatten(0, 1)).unflatten(0, (batch, steps))
        if (extra is None) != (self.extra_features == 0):
            raise ValueError(
                f"extra must be (B, T, {self.extra_features}), or None for 0, got "
                f"{None if extra is None else tuple(extra.shape)}"
            )
        known = encoded if extra is None else torch.cat((encoded, extra), -1)
        hidden = self.from_utterance(self.input_dropout(known))
        for memory, project in zip(self.memories, self.from_memory, strict=True):
            assert isinstance(memory, ReservoirMemory)
            recalled = memory(
                encoded if heard is None else heard,
                queries=encoded,
                streams=streams if memory.streams > 1 else None,
                lengths=lengths,
            )
            hidden = hidden + project(recalled)
        return self.output(self.dropout(torch.relu(hidden)))

    def reset(self, conversations: Tensor | None = None) -> None:
        """Reset all conversations (None), or those selected by a bool mask (B,) or indices."""
        for memory in self.memories:
            assert isinstance(memory, ReservoirMemory)
            memory.reset(conversations)

    def detach(self) -> None:
        """Detach the memories' states from the autograd graph."""
        for memory in self.memories:
            assert isinstance(memory, ReservoirMemory)
            memory.detach()

    @property
    def memory_bytes(self) -> int:
        """Bytes of state held between calls, whatever the conversations' lengths."""
        return sum(m.nbytes for m in self.memories if isinstance(m, ReservoirMemory))

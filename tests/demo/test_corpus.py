"""Sources of the text, and the part that is held out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resformer_kernels.demo import corpus
from resformer_kernels.demo.corpus import load_corpus


def write(folder: Path, name: str, text: bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text)


def text_of(x: torch.Tensor) -> bytes:
    return bytes(x.tolist())


def test_the_interpreters_text_has_english_and_python() -> None:
    documents = {d.name: d.text for d in corpus.interpreter_documents()}
    assert b"def " in documents["argparse.py"]
    assert not [name for name in documents if "site-packages" in name or "/test/" in name]
    loaded = load_corpus()
    assert len(loaded.train) > 2**20
    assert 0.02 < len(loaded.held_out) / len(loaded.train) < 0.3


def test_whole_files_are_held_out_the_same_ones_every_time(tmp_path: Path) -> None:
    for index in range(40):
        write(tmp_path, f"part/{index}.txt", f"file {index}: ".encode() * 400)
    one, other = load_corpus(tmp_path), load_corpus(tmp_path)
    assert torch.equal(one.train, other.train)
    assert torch.equal(one.held_out, other.held_out)
    train, held_out = text_of(one.train), text_of(one.held_out)
    assert one.train_documents + one.held_out_documents == 40
    for index in range(40):
        mark = f"file {index}: ".encode()
        assert (mark in train) != (mark in held_out)


def test_hidden_binary_and_repeated_files_are_left_out(tmp_path: Path) -> None:
    for index in range(8):
        write(tmp_path, f"{index}.txt", f"text {index} ".encode() * 1000)
    write(tmp_path, ".git/objects", b"hidden " * 1000)
    write(tmp_path, "image.bin", b"\0binary " * 1000)
    write(tmp_path, "copy.txt", b"text 1 " * 1000)
    loaded = load_corpus(tmp_path)
    assert loaded.train_documents + loaded.held_out_documents == 8
    everything = text_of(loaded.train) + text_of(loaded.held_out)
    assert b"hidden" not in everything
    assert b"binary" not in everything


def test_a_lone_file_gives_its_last_tenth(tmp_path: Path) -> None:
    write(tmp_path, "book.txt", b"a" * 90_000 + b"b" * 10_000)
    loaded = load_corpus(tmp_path / "book.txt")
    assert set(text_of(loaded.train)) == {ord("a")}
    assert set(text_of(loaded.held_out)) == {ord("b")}
    assert loaded.split == "the last tenth of the file"


def test_reading_stops_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_BYTES", 50_000)
    for index in range(20):
        write(tmp_path, f"{index}.txt", f"{index:04d}".encode() * 2500)
    loaded = load_corpus(tmp_path)
    assert len(loaded.train) + len(loaded.held_out) < 60_100


def test_bad_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no text was found"):
        load_corpus(tmp_path)
    write(tmp_path, "short.txt", b"too short")
    with pytest.raises(ValueError, match=r"has \d+ bytes to train on and \d+ held out"):
        load_corpus(tmp_path)

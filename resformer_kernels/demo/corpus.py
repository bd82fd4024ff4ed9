"""Real text: what ships with the interpreter, or any file or folder."""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

MAX_BYTES = 32 * 2**20
"""Limit of what is read: a demo of minutes trains on a part of it."""

_HELD_OUT_SHARE = 10
_MIN_HELD_OUT = 4096
_SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "site-packages", "dist-packages", "node_modules", "test", "tests", "idle_test")
)
# Folders of the standard library that hold tables of numbers and names.
_TABLES = frozenset(("encodings", "pydoc_data", "lib2to3"))
_SNIFFED = 8192


class Document(NamedTuple):
    """One text; a hash of `name` decides whether it is held out."""

    name: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes never trained on, each uint8 and one-dimensional."""

    source: str
    """Origin of the text, in words."""
    train: Tensor
    held_out: Tensor
    train_documents: int
    held_out_documents: int
    split: str
    """Choice of the held-out part, in words."""


def load_corpus(path: Path | None = None) -> Corpus:
    """The text at `path`, a file or a folder; None: the text of the running interpreter.

    Whole files are held out, chosen by a hash of their names, so that every run has the same
    split; a lone file gives its last tenth. Duplicates are dropped. FileNotFoundError where the
    path does not exist, ValueError where there is too little text.
    """
    source = str(path or "English text and Python source of the running interpreter")
    documents = _distinct(interpreter_documents() if path is None else path_documents(path))
    if len(documents) == 1:
        text = documents[0].text
        at = len(text) - len(text) // _HELD_OUT_SHARE
        parts = [text[:at]], [text[at:]]
        split = "the last tenth of the file"
    else:
        parts = _split(documents)
        split = f"whole files, about one in {_HELD_OUT_SHARE}, by a hash of their names"
    train, held_out = (b"\n".join(part) for part in parts)
    if len(held_out) < _MIN_HELD_OUT or len(train) < 4 * _MIN_HELD_OUT:
        raise ValueError(
            f"corpus: {source} has {len(train)} bytes to train on and {len(held_out)} held out; "
            f"it takes at least {4 * _MIN_HELD_OUT} and {_MIN_HELD_OUT} "
            "(--corpus PATH names another file or folder)"
        )
    return Corpus(source, _tensor(train), _tensor(held_out), len(parts[0]), len(parts[1]), split)


def interpreter_documents() -> Iterator[Document]:
    """The interpreter's help topics and texts, then the source of its standard library."""
    # Some distributions package the help topics apart.
    if importlib.util.find_spec("pydoc_data.topics") is not None:
        topics = importlib.import_module("pydoc_data.topics").topics
        for name in sorted(topics):
            yield Document(f"help/{name}", topics[name].encode())
    library = Path(sysconfig.get_path("stdlib"))
    yield from _read(library, (*library.rglob("*.txt"), *library.rglob("*.rst")), _SKIPPED_FOLDERS)
    yield from _read(library, library.rglob("*.py"), _SKIPPED_FOLDERS | _TABLES)


def path_documents(path: Path) -> Iterator[Document]:
    """The file, or every text file below the folder that is not hidden."""
    if not path.exists():
        raise FileNotFoundError(f"corpus: {path} does not exist")
    if path.is_file():
        yield Document(path.name, path.read_bytes()[:MAX_BYTES])
        return
    yield from _read(path, path.rglob("*"), _SKIPPED_FOLDERS)


def _read(root: Path, paths: Iterable[Path], skipped: Collection[str]) -> Iterator[Document]:
    """The text files among `paths` that are not hidden and lie in no skipped folder."""
    for path in sorted(paths):
        inner = path.relative_to(root)
        if path.is_file() and not any(x.startswith(".") or x in skipped for x in inner.parts):
            text = path.read_bytes()
            if b"\0" not in text[:_SNIFFED]:
                yield Document(inner.as_posix(), text)


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _distinct(documents: Iterable[Document]) -> list[Document]:
    """Documents with different texts, up to MAX_BYTES."""
    found: dict[bytes, Document] = {}
    size = 0
    for document in documents:
        if document.text and document.text not in found:
            found[document.text] = document
            size += len(document.text)
            if size >= MAX_BYTES:
                break
    if not found:
        raise ValueError("corpus: no text was found (--corpus PATH names a file or folder)")
    return list(found.values())


def _split(documents: list[Document]) -> tuple[list[bytes], list[bytes]]:
    """Texts to train on and held-out texts, ordered by hash: any prefix is a fair sample."""
    buckets = {d: hashlib.blake2b(d.name.encode(), digest_size=8).digest() for d in documents}
    ordered = sorted(documents, key=lambda document: buckets[document])
    held_out = [d for d in ordered if int.from_bytes(buckets[d], "big") % _HELD_OUT_SHARE == 0]
    if len(held_out) in (0, len(ordered)):
        held_out = ordered[:1]
    names = {document.name for document in held_out}
    return [d.text for d in ordered if d.name not in names], [d.text for d in held_out]

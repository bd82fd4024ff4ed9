"""Real text: what ships with the interpreter, or any file or folder."""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MAX_BYTES = 32 * 2**20
"""Reading stops here: a demo of minutes sees a part of this."""

_HELD_OUT_SHARE = 10
_MIN_HELD_OUT = 4096
_SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "site-packages", "dist-packages", "node_modules", "test", "tests", "idle_test")
)
# Tables of numbers and names rather than anything anyone wrote.
_SKIPPED_PYTHON = frozenset(("encodings", "pydoc_data", "lib2to3"))
_SNIFFED = 8192


@dataclass(frozen=True)
class Document:
    """One text; `name` decides whether it is held out."""

    name: str
    text: bytes


@dataclass(frozen=True)
class Corpus:
    """Bytes to train on and bytes never trained on, each uint8 and one-dimensional."""

    source: str
    """Where the text is from, in words."""
    train: Tensor
    held_out: Tensor
    train_documents: int
    held_out_documents: int
    split: str
    """How the held-out part was chosen, in words."""


def load_corpus(path: Path | None = None) -> Corpus:
    """The text at `path`, a file or a folder; None: the text of the running interpreter.

    Whole files are held out, chosen by a hash of their names, so that every run has the same
    split; a lone file gives its last tenth. Duplicates are dropped. FileNotFoundError where the
    path does not exist, ValueError where there is too little text.
    """
    if path is None:
        source = "English text and Python source of the running interpreter"
        documents = _unique(interpreter_documents())
    else:
        source = str(path)
        documents = _unique(path_documents(path))
    if len(documents) == 1:
        train, held_out = _cut(documents[0])
        split = "the last tenth of the file"
    else:
        train, held_out = _split(documents)
        split = f"whole files, about one in {_HELD_OUT_SHARE}, by a hash of their names"
    corpus = Corpus(source, _tensor(train), _tensor(held_out), len(train), len(held_out), split)
    if len(corpus.held_out) < _MIN_HELD_OUT or len(corpus.train) < 4 * _MIN_HELD_OUT:
        raise ValueError(
            f"corpus: {source} has {len(corpus.train)} bytes to train on and "
            f"{len(corpus.held_out)} held out; it takes at least {4 * _MIN_HELD_OUT} and "
            f"{_MIN_HELD_OUT} (--corpus PATH names another file or folder)"
        )
    return corpus


def interpreter_documents() -> Iterator[Document]:
    """The interpreter's help topics and texts, then the source of its standard library."""
    # Some distributions package the help topics apart.
    if importlib.util.find_spec("pydoc_data.topics") is not None:
        topics = importlib.import_module("pydoc_data.topics").topics
        for name in sorted(topics):
            yield Document(f"help/{name}", topics[name].encode())
    library = Path(sysconfig.get_path("stdlib"))
    texts = (path for pattern in ("*.txt", "*.rst") for path in library.rglob(pattern))
    yield from _read(library, sorted(path for path in texts if _wanted(path, library)))
    sources = (path for path in library.rglob("*.py") if _wanted(path, library))
    yield from _read(
        library,
        sorted(p for p in sources if not _SKIPPED_PYTHON & set(p.relative_to(library).parts)),
    )


def path_documents(path: Path) -> Iterator[Document]:
    """The file, or every text file below the folder that is not hidden."""
    if not path.exists():
        raise FileNotFoundError(f"corpus: {path} does not exist")
    if path.is_file():
        yield Document(path.name, path.read_bytes()[:MAX_BYTES])
        return
    files = sorted(p for p in path.rglob("*") if p.is_file() and _wanted(p, path))
    yield from _read(path, files)


def _wanted(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and not _SKIPPED_FOLDERS & set(parts)


def _read(root: Path, files: Iterable[Path]) -> Iterator[Document]:
    for path in files:
        if not path.is_file():
            continue
        text = path.read_bytes()
        if text and b"\0" not in text[:_SNIFFED]:
            yield Document(path.relative_to(root).as_posix(), text)


def _unique(documents: Iterable[Document]) -> list[Document]:
    seen: set[bytes] = set()
    kept: list[Document] = []
    size = 0
    for document in documents:
        digest = hashlib.blake2b(document.text, digest_size=16).digest()
        if digest in seen or not document.text:
            continue
        seen.add(digest)
        kept.append(document)
        size += len(document.text)
        if size >= MAX_BYTES:
            break
    if not kept:
        raise ValueError("corpus: no text was found (--corpus PATH names a file or folder)")
    return kept


def _bucket(document: Document) -> int:
    return int.from_bytes(hashlib.blake2b(document.name.encode(), digest_size=8).digest(), "big")


def _split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    # Order by hash too: a prefix of the text is then a fair sample of it.
    documents = sorted(documents, key=_bucket)
    held_out = [d for d in documents if _bucket(d) % _HELD_OUT_SHARE == 0]
    if not held_out or len(held_out) == len(documents):
        held_out = documents[:1]
    names = {d.name for d in held_out}
    return [d for d in documents if d.name not in names], held_out


def _cut(document: Document) -> tuple[list[Document], list[Document]]:
    at = len(document.text) - len(document.text) // _HELD_OUT_SHARE
    parts = (document.text[:at], document.text[at:])
    train, held_out = ([Document(document.name, part)] for part in parts)
    return train, held_out


def _tensor(documents: list[Document]) -> Tensor:
    joined = bytearray(b"\n".join(document.text for document in documents))
    return torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0).byte()

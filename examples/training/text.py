"""Text of a file or a folder as memory-mapped tokens, prepared once.

A prepared folder holds `train-00000.bin`, `validation-00000.bin` and so on, each a plain array of
uint8 or uint16, `prepared.json` that describes them, and a BPE tokenizer's `tokenizer.json`. It
gets its name, a digest of the sources and settings, when it is complete.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from training import FlagError

FORMAT = 1
DESCRIPTION = "prepared.json"
SPLITS = ("train", "validation")
SHARD_TOKENS = 2**26
"""Tokens of a file; the last one has fewer."""
END_OF_TEXT = "<|endoftext|>"
"""Stands after every document where the tokenizer is BPE."""

_PIECE = 2**20
_FOR_BPE = 64 * 2**20
"""Bytes of training text that a BPE vocabulary is learned from."""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    def encode(self, text: bytes) -> NDArray[Any]:
        """Tokens of UTF-8 text, one-dimensional."""

    def end(self) -> NDArray[Any]:
        """What stands after a document."""

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; bytes that are no UTF-8 become replacement characters."""


class Bytes:
    """A token for every byte; a newline stands after a document."""

    vocab_size = 256

    def encode(self, text: bytes) -> NDArray[Any]:
        """The bytes."""
        return np.frombuffer(text, np.uint8)

    def end(self) -> NDArray[Any]:
        """A newline."""
        return self.encode(b"\n")

    def decode(self, tokens: list[int]) -> str:
        """The bytes as UTF-8."""
        return bytes(tokens).decode("utf-8", errors="replace")


class BytePairs:
    """Byte-level BPE of the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Stored

        self._tokenizer = Stored.from_file(str(path))
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def encode(self, text: bytes) -> NDArray[Any]:
        """Tokens; bytes that are no UTF-8 are replaced."""
        found = self._tokenizer.encode(text.decode("utf-8", errors="replace"))
        return np.array(found.ids, np.uint16)

    def end(self) -> NDArray[Any]:
        """The token `END_OF_TEXT`."""
        return np.array([self._tokenizer.token_to_id(END_OF_TEXT)], np.uint16)

    def decode(self, tokens: list[int]) -> str:
        """The text; `END_OF_TEXT` is left out."""
        return self._tokenizer.decode(tokens)


def train_byte_pairs(pieces: Iterable[bytes], vocab_size: int, path: Path) -> None:
    """Learn a byte-level BPE vocabulary of at most `vocab_size` tokens, and store it at `path`."""
    from tokenizers import Tokenizer as New
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = New(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (piece.decode("utf-8", errors="replace") for piece in pieces)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


@dataclass(frozen=True)
class Source:
    """What is prepared, and how."""

    path: Path
    tokenizer: str
    """"bytes" or "bpe"."""
    vocab_size: int
    """The most tokens of a BPE vocabulary."""
    held_out: float
    """Share of the text that is not trained on."""

    def files(self) -> list[Path]:
        """The file, or every file below the folder that is not hidden, by name."""
        if self.path.is_file():
            return [self.path]
        if not self.path.is_dir():
            raise FlagError(f"--data: {self.path} is neither a file nor a folder")
        inside = [(p, p.relative_to(self.path).parts) for p in sorted(self.path.rglob("*"))]
        found = [
            p for p, parts in inside if p.is_file() and not any(x.startswith(".") for x in parts)
        ]
        if not found:
            raise FlagError(f"--data: {self.path} holds no files")
        return found

    def fingerprint(self) -> str:
        """Digest of the settings and of the files' names, sizes and times of change."""
        files = [
            (str(p.relative_to(self.path.parent)), p.stat().st_size, p.stat().st_mtime_ns)
            for p in self.files()
        ]
        settings = (FORMAT, self.tokenizer, self.vocab_size, self.held_out, files)
        return hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()

    def parts(self) -> dict[str, list[tuple[Path, int, int]]]:
        """(file, first byte, last byte) of each split.

        A lone file's end is held out, from the start of a line. Of more files whole ones are,
        chosen by a hash of their names: adding a file moves no other.
        """
        files = self.files()
        if len(files) == 1:
            (file,) = files
            size = file.stat().st_size
            with file.open("rb") as opened:
                opened.seek(size - int(self.held_out * size))
                opened.readline()
                at = opened.tell()
            return {"train": [(file, 0, at)], "validation": [(file, at, size)]}
        parts: dict[str, list[tuple[Path, int, int]]] = {split: [] for split in SPLITS}
        for file in files:
            name = file.relative_to(self.path).as_posix().encode()
            place = int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") / 2**64
            split = SPLITS[place < self.held_out]
            parts[split].append((file, 0, file.stat().st_size))
        return parts


def pieces(part: tuple[Path, int, int]) -> Iterator[bytes]:
    """The text between two bytes of a file, about a mebibyte at a time, cut after lines."""
    file, first, last = part
    with file.open("rb") as opened:
        opened.seek(first)
        while opened.tell() < last:
            piece = opened.read(min(_PIECE, last - opened.tell()))
            if opened.tell() < last:
                piece += opened.readline(_PIECE)
            yield piece


def _at_most(size: int, texts: Iterable[bytes]) -> Iterator[bytes]:
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return


class _Shards:
    """Writes tokens of one split into files of `SHARD_TOKENS` each."""

    def __init__(self, folder: Path, split: str, dtype: type[np.generic], limit: int) -> None:
        self.folder, self.split, self.dtype, self.limit = folder, split, dtype, limit
        self.lengths: list[int] = []

    def append(self, tokens: NDArray[Any]) -> None:
        while len(tokens):
            if not self.lengths or self.lengths[-1] == self.limit:
                self.lengths.append(0)
            fitting = tokens[: self.limit - self.lengths[-1]]
            name = shard_name(self.split, len(self.lengths) - 1)
            with (self.folder / name).open("ab") as file:
                file.write(fitting.astype(self.dtype).tobytes())
            self.lengths[-1] += len(fitting)
            tokens = tokens[len(fitting) :]


def shard_name(split: str, number: int) -> str:
    """The name of a split's file."""
    return f"{split}-{number:05}.bin"


@dataclass(frozen=True)
class Description:
    """What `prepared.json` says."""

    format: int
    tokenizer: str
    vocab_size: int
    dtype: str
    """"uint8" or "uint16"."""
    lengths: dict[str, list[int]]
    """Tokens of every file of each split."""


def prepared_folder(source: Source, root: Path) -> Path:
    """Where the prepared text of `source` is, or will be."""
    return root / source.fingerprint()


def prepare(
    source: Source, root: Path, say: Callable[[str], None], *, limit: int = SHARD_TOKENS
) -> Path:
    """The prepared folder, made by one process unless it is there. FlagError names the flag of
    whatever is missing.

    Args:
        source: what to prepare.
        root: the folder of prepared folders.
        say: is told what happens.
        limit: tokens of a file.
    """
    folder = prepared_folder(source, root)
    if folder.exists():
        return folder
    if source.tokenizer == "bpe" and importlib.util.find_spec("tokenizers") is None:
        raise FlagError("--tokenizer bpe needs a package: pip install tokenizers")
    parts = source.parts()
    for split in SPLITS:
        if not sum(last - first for _, first, last in parts[split]):
            raise FlagError(
                f"--data: nothing of {source.path} is left for {split} with --held-out "
                f"{source.held_out}"
            )
    say(f"preparing {source.path}")
    unfinished = root / f"{folder.name}.part-{os.getpid()}"
    unfinished.mkdir(parents=True)
    try:
        description = _write(source, parts, unfinished, limit)
        (unfinished / DESCRIPTION).write_text(json.dumps(asdict(description), indent=1) + "\n")
        unfinished.rename(folder)
    finally:
        if unfinished.exists():
            shutil.rmtree(unfinished)
    counts = ", ".join(f"{sum(description.lengths[split]):,} for {split}" for split in SPLITS)
    say(f"prepared {folder}: tokens {counts}")
    return folder


def _write(
    source: Source, parts: dict[str, list[tuple[Path, int, int]]], folder: Path, limit: int
) -> Description:
    if source.tokenizer == "bpe":
        texts = _at_most(_FOR_BPE, (piece for part in parts["train"] for piece in pieces(part)))
        train_byte_pairs(texts, source.vocab_size, folder / "tokenizer.json")
    tokenizer = open_tokenizer(folder, source.tokenizer)
    dtype = np.uint8 if tokenizer.vocab_size <= 2**8 else np.uint16
    lengths = {}
    for split in SPLITS:
        shards = _Shards(folder, split, dtype, limit)
        for part in parts[split]:
            for piece in pieces(part):
                shards.append(tokenizer.encode(piece))
            shards.append(tokenizer.end())
        lengths[split] = shards.lengths
    name = np.dtype(dtype).name
    return Description(FORMAT, source.tokenizer, tokenizer.vocab_size, name, lengths)


def describe(folder: Path) -> Description:
    """What a prepared folder holds; FlagError where it is not there or of another version."""
    path = folder / DESCRIPTION
    if not path.exists():
        raise FlagError(
            f"--prepared: {folder} was prepared by rank 0 and is not visible here; name a folder "
            "that every node shares"
        )
    found = json.loads(path.read_text())
    if found.get("format") != FORMAT:
        raise FlagError(f"--prepared: {folder} has format {found.get('format')}, not {FORMAT}")
    return Description(**found)


def open_tokenizer(folder: Path, tokenizer: str) -> Tokenizer:
    """The tokenizer of a prepared folder."""
    return Bytes() if tokenizer == "bytes" else BytePairs(folder / "tokenizer.json")

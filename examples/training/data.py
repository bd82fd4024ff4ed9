"""Which tokens a step trains on: a function of seed, step and global batch alone.

No rank and no iterator appears in it, so any number of ranks sees the same batches, and a run that
is resumed at a step goes on with the batch that was next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training import FlagError
from training.text import Description, shard_name

_ROUNDS = 4


def scrambled(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of each of x: the finalizer of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*numbers: int) -> NDArray[np.uint64]:
    """A hash of some numbers, (1,)."""
    key = np.zeros(1, np.uint64)
    for number in numbers:
        key = scrambled(key ^ np.array([number], np.uint64))
    return key


def permuted(places: NDArray[np.uint64], count: int, key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Where a pseudorandom permutation of 0 to count - 1 takes `places`, without a table of it.

    A Feistel network permutes the least power of 4 that holds `count`; what lands at `count` or
    above is permuted again until it does not.
    """
    bits = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << bits) - np.uint64(1)
    keys = [scrambled(key + np.uint64(number)) for number in range(_ROUNDS)]
    result = places.copy()
    outside = np.ones(len(places), bool)
    while outside.any():
        left, right = result[outside] >> bits, result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (scrambled(right + round_key) & mask)
        result[outside] = left << bits | right
        outside = result >= np.uint64(count)
    return result


@dataclass(frozen=True)
class Order:
    """Where sequences start in a text that is gone through again and again.

    Each pass cuts the text into windows of `length` tokens at a place of its own and takes them in
    an order of its own.
    """

    tokens: int
    """Tokens of the text."""
    length: int
    """Tokens of a sequence; with the target of the last one it reads one more."""
    seed: int

    def __post_init__(self) -> None:
        if self.tokens <= self.length:
            raise FlagError(
                f"--seqlen: the text has {self.tokens} tokens, too few for sequences of "
                f"{self.length}"
            )

    @property
    def windows(self) -> int:
        """Sequences of a pass. One is left out to make room for the place of the first cut."""
        return max(1, (self.tokens - 1) // self.length - 1)

    def starts(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """The first token of sequences, (n,), by their number since the first step, (n,)."""
        passes, places = np.divmod(numbers, self.windows)
        result = np.empty_like(numbers)
        room = min(self.length, self.tokens - self.windows * self.length)
        for one in np.unique(passes):
            key = key_of(self.seed, int(one))
            shift = int(scrambled(key)[0]) % room
            here = passes == one
            moved = permuted(places[here].astype(np.uint64), self.windows, key)
            result[here] = moved.astype(np.int64) * self.length + shift
        return result


class Tokens:
    """The memory-mapped files of a split, as one text."""

    def __init__(self, folder: Path, description: Description, split: str) -> None:
        lengths = description.lengths[split]
        self._files = [
            np.memmap(folder / shard_name(split, number), description.dtype, "r", shape=(length,))
            for number, length in enumerate(lengths)
        ]
        self._starts = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """`length` tokens from `start` on, (length,), also across files."""
        found: list[NDArray[Any]] = []
        end = start + length
        number = int(np.searchsorted(self._starts, start, "right")) - 1
        while start < end:
            first = int(self._starts[number])
            found.append(self._files[number][start - first : end - first])
            start += len(found[-1])
            number += 1
        return np.concatenate(found).astype(np.int64)

    def sequences(self, starts: Sequence[int] | NDArray[np.int64], length: int) -> Tensor:
        """(n, length + 1) int64 tokens, a row for each start: inputs, and targets one further."""
        rows = [self.read(int(start), length + 1) for start in starts]
        return torch.from_numpy(np.stack(rows))


@dataclass(frozen=True)
class Batches:
    """The sequences of every step."""

    text: Tokens
    order: Order
    size: int
    """Sequences of a step, over all ranks and micro-batches."""

    def rows(self, step: int, first: int, last: int) -> Tensor:
        """Rows `first` to `last` - 1 of the batch of `step`, counted from 0: (n, length + 1)."""
        numbers = np.arange(step * self.size + first, step * self.size + last, dtype=np.int64)
        return self.text.sequences(self.order.starts(numbers), self.order.length)


@dataclass(frozen=True)
class HeldOut:
    """Sequences to validate on: the same at every validation, spread over the text. A text with
    fewer is gone through again."""

    text: Tokens
    length: int
    batches: int
    size: int
    """Sequences of a batch."""

    def __post_init__(self) -> None:
        if len(self.text) <= self.length:
            raise FlagError(
                f"--held-out: {len(self.text)} tokens are held out, too few for sequences of "
                f"{self.length} (--seqlen)"
            )

    def rows(self, batch: int, first: int, last: int) -> Tensor:
        """Rows `first` to `last` - 1 of a batch: (n, length + 1)."""
        windows = (len(self.text) - 1) // self.length
        stride = max(1, windows // (self.batches * self.size))
        numbers = np.arange(batch * self.size + first, batch * self.size + last, dtype=np.int64)
        return self.text.sequences(numbers * stride % windows * self.length, self.length)

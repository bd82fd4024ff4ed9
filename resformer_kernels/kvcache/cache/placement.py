"""Placement of sequences in a cache: a row each, or pages.

Every call succeeds as a whole, or raises and changes nothing: ValueError for a sequence that does
not exist and for a length out of range, RuntimeError where room runs out. Sequences have names,
ints that are never used again. The caller makes the copies that a call returns before it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from resformer_kernels.kvcache.cache.pages import block_table, page_table
from resformer_kernels.kvcache.cache.storage import Copy


class Rows:
    """A row of `max_seqlen` tokens for each of at most `batch` sequences."""

    def __init__(self, batch: int, max_seqlen: int) -> None:
        self.batch, self.capacity = batch, max_seqlen
        self._rows: dict[int, int] = {}
        self._lengths: dict[int, int] = {}
        self._free = list(range(batch))[::-1]
        self._next = 0

    def _require(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            if sequence not in self._rows:
                gone = 0 <= sequence < self._next
                said = "was freed" if gone else "does not exist"
                raise ValueError(f"sequence {sequence} {said}")
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"a sequence is named twice in {tuple(sequences)}")

    def _take(self, length: int) -> int:
        name, self._next = self._next, self._next + 1
        self._rows[name], self._lengths[name] = self._free.pop(), length
        return name

    def _require_rows(self, count: int) -> None:
        if count > len(self._free):
            raise RuntimeError(
                f"the cache is full: {count} more sequences were asked for, {len(self._free)} of "
                f"its {self.batch} rows are free"
            )

    def create(self, count: int) -> list[int]:
        """Add empty sequences; their names."""
        self._require_rows(count)
        return [self._take(0) for _ in range(count)]

    def append(self, sequences: Sequence[int], tokens: int) -> list[Copy]:
        """Make room for `tokens` more in each; the caller has checked the capacity."""
        self._require(sequences)
        for sequence in sequences:
            self._lengths[sequence] += tokens
        return []

    def fork(self, sequence: int) -> tuple[int, list[Copy]]:
        """Add a sequence with the same tokens; its name."""
        self._require([sequence])
        self._require_rows(1)
        twin = self._take(self._lengths[sequence])
        return twin, [Copy(self._rows[sequence], self._rows[twin], self._lengths[sequence])]

    def crop(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Keep the first tokens of each."""
        self._require(sequences)
        for sequence, length in zip(sequences, lengths, strict=True):
            if not 0 <= length <= self._lengths[sequence]:
                raise ValueError(
                    f"sequence {sequence} has {self._lengths[sequence]} tokens and cannot be "
                    f"cropped to {length}"
                )
        self._lengths.update(zip(sequences, lengths, strict=True))

    def free(self, sequences: Sequence[int]) -> None:
        """Remove sequences and give their room back."""
        self._require(sequences)
        for sequence in sequences:
            self._free.append(self._rows.pop(sequence))
            del self._lengths[sequence]

    def reorder(
        self, sequences: Sequence[int], picks: Sequence[int]
    ) -> tuple[list[int], list[Copy]]:
        """The sequences at `picks`: kept, forked where picked again, freed where never picked."""
        self._require(sequences)
        dropped = [s for place, s in enumerate(sequences) if place not in picks]
        repeated = len(picks) - len(set(picks))
        if repeated > len(self._free) + len(dropped):
            self._require_rows(repeated - len(dropped))
        self.free(dropped)
        names: list[int] = []
        copies: list[Copy] = []
        for pick in picks:
            if sequences[pick] in names:
                twin, made = self.fork(sequences[pick])
                names.append(twin)
                copies += made
            else:
                names.append(sequences[pick])
        return names, copies

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        self._require([sequence])
        return self._lengths[sequence]

    def table(self, sequences: Sequence[int], tokens: int = 0) -> Tensor | None:
        """The op's block_table on the CPU, wide enough for `tokens` more; None where row b of the
        cache is sequence b of all."""
        del tokens  # a row has its full length from the start
        rows = [self._rows[sequence] for sequence in sequences]
        if rows == list(range(self.batch)):
            return None
        return torch.tensor(rows, dtype=torch.int32).view(len(rows), 1)

    def utilisation(self) -> float:
        """Share of the room that is taken."""
        room = self.batch * self.capacity
        return sum(self._lengths.values()) / room if room else 0.0


class Pages:
    """`num_pages` pages of `page_size` tokens, by the host module; methods as of `Rows`."""

    def __init__(self, num_pages: int, page_size: int, max_seqlen: int | None) -> None:
        self._table = table = page_table(num_pages, page_size)
        self.create, self.crop = table.create, table.crop
        self.free, self.length = table.free, table.length
        self._page_size = page_size
        self._width = None if max_seqlen is None else -(-max_seqlen // page_size)
        self.capacity = num_pages * page_size if max_seqlen is None else max_seqlen

    def append(self, sequences: Sequence[int], tokens: int) -> list[Copy]:
        pairs = self._table.append(sequences, tokens)
        return [Copy(source, target, self._page_size) for source, target in pairs]

    def fork(self, sequence: int) -> tuple[int, list[Copy]]:
        return self._table.fork(sequence), []

    def reorder(
        self, sequences: Sequence[int], picks: Sequence[int]
    ) -> tuple[list[int], list[Copy]]:
        return self._table.reorder(sequences, picks), []

    def table(self, sequences: Sequence[int], tokens: int = 0) -> Tensor | None:
        width = self._width
        if width is None:
            longest = max((self.length(s) for s in sequences), default=0) + tokens
            width = -(-longest // self._page_size)
        return block_table(self._table, sequences, width)

    def utilisation(self) -> float:
        pages = self._table.num_pages
        return 1.0 - self._table.free_pages / pages if pages else 0.0


Placement: TypeAlias = Rows | Pages

"""Sequences that are split across ranks, and what serves a call on them.

`resformer_kernels.distributed.context_parallel` enters a `Split`; `serve` hands it every call of a
public op, and `nn.RotaryEmbedding` asks it for positions. Nothing here knows of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Split(Protocol):
    """A sequence of which this process holds a part."""

    def serve(self, op: str, backend: str, backends: Sequence[Any], call: Any, /) -> Any:
        """What the op's backend would return for the whole sequence: this process's part of it."""

    def ranges(self, length: int, /) -> Sequence[tuple[int, int]]:
        """(start, stop) of the positions of this process's `length` tokens, in their order."""


_entered: list[Split] = []


def current() -> Split | None:
    """The split that calls are under; None: a process holds its sequences whole."""
    return _entered[-1] if _entered else None


@contextmanager
def entered(split: Split) -> Iterator[None]:
    """Put calls under `split`."""
    _entered.append(split)
    try:
        yield
    finally:
        _entered.pop()

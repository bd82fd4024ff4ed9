"""The configurations of attention's Triton kernels to try, and the choice among those timed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from typing import Any, TypeAlias, TypeVar

from resformer_kernels._triton.arch import ARCHITECTURES

T = TypeVar("T")
Config: TypeAlias = tuple[int, int, int, int]
"""Rows and keys of a tile, warps of a program, stages of its pipeline."""
Table: TypeAlias = dict[str, Any]
"""The content of attention/triton/configs.json."""

DIRECTIONS = ("forward", "keys", "queries")
MASKS = ("causal", "full", "window")
PRECISIONS = ("half", "float32")
HEAD_DIMS = (128, 64, 256)
PLACEMENT_ROWS = (64, 128, 256, 512, 1024, 2048, 4096)
"""Rows a KV head, at which both placements of the mix are timed."""

GAIN = 0.02
"""The share by which another configuration must be faster than the table's: above noise."""

_ROWS, _KEYS, _WARPS, _STAGES = (16, 32, 64, 128, 256), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
_SHARED_BYTES = {arch.name: arch.shared_bytes for arch in ARCHITECTURES.values()}
_ACCUMULATORS = 192
"""The most of a thread's 255 registers that its share of the sums and scores takes."""
_LEAST_ACCUMULATORS = 24
"""With fewer, the tile is too small for a program."""


@dataclass(frozen=True)
class Point:
    """An entry of the table of one architecture."""

    direction: str
    precision: str
    head_dim: int
    mask: str

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.direction} {self.precision} D{self.head_dim} {self.mask}"


@dataclass(frozen=True)
class Trial:
    """A configuration to try at a point."""

    point: Point
    config: Config

    @property
    def name(self) -> str:
        """In words."""
        rows, keys, warps, stages = self.config
        return f"{self.point.name} {rows}x{keys} warps {warps} stages {stages}"


def named(name: str) -> Trial:
    """The trial of a `Trial.name`."""
    direction, precision, dim, mask, tile, _, warps, _, stages = name.split()
    rows, keys = tile.split("x")
    point = Point(direction, precision, int(dim.removeprefix("D")), mask)
    return Trial(point, (int(rows), int(keys), int(warps), int(stages)))


def points(
    head_dims: Sequence[int] = HEAD_DIMS,
    directions: Sequence[str] = DIRECTIONS,
    masks: Sequence[str] = MASKS,
    precisions: Sequence[str] = PRECISIONS[:1],
) -> list[Point]:
    """Every point, the most important first."""
    return [
        Point(direction, precision, head_dim, mask)
        for precision, mask, head_dim, direction in product(
            precisions, masks, head_dims, directions
        )
    ]


def current(table: Table, architecture: str, point: Point) -> Config:
    """The table's configuration of a point; where its mask has none, that of "full"."""
    by_mask = table[architecture][point.direction][point.precision][str(point.head_dim)]
    rows, keys, warps, stages = by_mask.get(point.mask, by_mask["full"])
    return rows, keys, warps, stages


def candidates(table: Table, architecture: str, point: Point) -> list[Trial]:
    """The table's own configuration, then all that fit, those like it first."""
    own = current(table, architecture, point)
    fitting = [
        config
        for config in product(_ROWS, _KEYS, _WARPS, _STAGES)
        if config != own and _fits(config, architecture, point)
    ]
    fitting.sort(key=lambda config: _distance(config, own))
    return [Trial(point, config) for config in (own, *fitting)]


def in_turn(lists: Sequence[Sequence[T]]) -> list[T]:
    """Items of each list in turn, so that a search that runs out of time has tried all points."""
    return [item for row in zip_longest(*lists) for item in row if item is not None]


def _distance(config: Config, other: Config) -> float:
    return sum(abs(math.log2(a / b)) for a, b in zip(config, other, strict=True))


def _fits(config: Config, architecture: str, point: Point) -> bool:
    rows, keys, warps, stages = config
    dim, size = point.head_dim, 2 if point.precision == "half" else 4
    # Elements of q and dO, or of k and V': resident ones and streamed ones. Forward has no dO.
    if point.direction == "forward":
        resident, streamed, sums = rows * dim, 2 * keys * dim, rows * dim + rows * keys
    elif point.direction == "keys":
        resident, streamed = 2 * keys * dim, 2 * rows * dim
        sums = 2 * keys * dim + 2 * rows * keys
    else:
        resident, streamed = 2 * rows * dim, 2 * keys * dim
        sums = rows * dim + 2 * rows * keys
    shared = (resident + stages * streamed) * size
    each = sums / (32 * warps)
    return shared <= _SHARED_BYTES[architecture] and _LEAST_ACCUMULATORS <= each <= _ACCUMULATORS


def best(seconds: Mapping[Trial, float], own: Trial) -> Trial:
    """The fastest of the trials of a point; `own` where none is faster by more than noise."""
    fastest = min(seconds, key=lambda trial: seconds[trial])
    return fastest if seconds[fastest] < (1 - GAIN) * seconds[own] else own


def inline_rows(seconds: Mapping[int, tuple[float, float]]) -> int:
    """Rows up to which mixing inline wins, from (inline, prologue) seconds by rows; 0: none."""
    found = 0
    for rows in sorted(seconds):
        inline, prologue = seconds[rows]
        if inline > prologue:
            break
        found = rows
    return found


def updated(
    table: Table,
    architecture: str,
    winners: Mapping[Point, Config],
    placements: Mapping[int, int],
) -> Table:
    """The table with `winners` in it, and where mixing inline wins, by head_dim."""
    new: Table = json.loads(json.dumps(table))
    for point, config in winners.items():
        by_dim = new[architecture][point.direction][point.precision]
        by_dim[str(point.head_dim)][point.mask] = list(config)
    for head_dim, rows in placements.items():
        new[architecture]["inline_rows"][str(head_dim)] = rows
    return new


def dumps(table: Table) -> str:
    """JSON with a configuration a line."""
    text = json.dumps(table, indent=1)
    return re.sub(r"\[[\d,\s]+\]", lambda numbers: json.dumps(json.loads(numbers[0])), text)

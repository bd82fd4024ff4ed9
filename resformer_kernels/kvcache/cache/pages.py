"""Paging and decode planning: the compiled host module (csrc/host), loaded at first use."""

from __future__ import annotations

import functools
import importlib
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from resformer_kernels._host import DecodePlan, PageTable

_MODULE = "resformer_kernels._host"


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        return importlib.import_module(_MODULE), None
    except ImportError as error:
        return None, (
            f"the host module is not built for Python {platform.python_version()} ({error}): "
            "install the package again with this Python, where a C++ compiler, pybind11 and "
            "Python's headers are"
        )


def unavailable_reason() -> str | None:
    """Load the host module if that was not tried yet; None when it is usable, else why not."""
    return _load()[1]


def _module() -> Any:
    module, reason = _load()
    if reason is not None:
        raise RuntimeError(f"resformer_kernels: {reason}")
    return module


def page_table(num_pages: int, page_size: int) -> PageTable:
    """The allocator of `num_pages` pages of `page_size` tokens.

    It keeps a list of pages for each sequence and counts who holds a page. `append(sequences, n)`
    makes room for n more tokens in each sequence and returns the (from, to) pages to copy before
    anything is written: a page that is written and that a fork holds too is exchanged for one of
    its own. `fork`, `crop`, `reorder`, `free` move no tokens. Each call does all that it was asked
    or raises and changes nothing: ValueError for a sequence that does not exist or was freed and
    for a length out of range, RuntimeError where pages run out. RuntimeError where the host module
    is not built.
    """
    table: PageTable = _module().PageTable(num_pages, page_size)
    return table


def block_table(table: PageTable, sequences: Sequence[int], width: int) -> Tensor:
    """The first `width` page numbers of each sequence, (sequences, width) int32 on the CPU; 0
    beyond its last page."""
    if not sequences or not width:
        return torch.zeros((len(sequences), width), dtype=torch.int32)
    rows = table.block_table(sequences, width)
    return torch.frombuffer(rows, dtype=torch.int32).view(len(sequences), width)


def plan_decode(
    lengths: Sequence[int],
    heads: int,
    workers: int,
    *,
    tile: int = 64,
    overhead: int = 64,
    max_groups: int = 1,
) -> DecodePlan:
    """How to cut up a decode step over sequences of these lengths.

    A worker reads a part of one sequence's keys for one KV head. Parts are alike in length as far
    as the lengths allow, and so short that all workers are busy, and no shorter: of two plans
    within a twentieth the one with fewer parts is taken.

    Args:
        lengths: keys of each sequence.
        heads: KV heads.
        workers: threads of a CPU, or multiprocessors of a GPU.
        tile: keys that the kernel reads at once; parts are multiples of it.
        overhead: what one more part costs, in keys.
        max_groups: how many calls the step may be served by. Sequences that need about as many
            parts go together.

    Returns:
        `groups`, the longest sequences first: each has `sequences` (places in the batch) and their
        `num_splits`; `keys_per_split`; and `efficiency`, the share of the workers' time spent on
        keys, after the same model.

    Raises:
        ValueError: an argument is below its least value.
        RuntimeError: the host module is not built.
    """
    plan: DecodePlan = _module().plan_decode(
        lengths, heads, workers, tile=tile, overhead=overhead, max_groups=max_groups
    )
    return plan

"""Page allocator and decode planner: the compiled host module (csrc/host), loaded at first use."""

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
    """Load the host module on the first call; None when it is usable, else why not."""
    return _load()[1]


def _module() -> Any:
    module, reason = _load()
    if reason is not None:
        raise RuntimeError(f"resformer_kernels: {reason}")
    return module


def page_table(num_pages: int, page_size: int) -> PageTable:
    """The allocator of `num_pages` pages of `page_size` tokens.

    It holds a list of pages for each sequence and counts the holders of a page. `append(sequences,
    n)` makes room for n more tokens in each sequence and returns the (from, to) pages to copy
    before anything is written: a shared page is copied before its first write (copy-on-write).
    `fork`, `crop`, `reorder`, `free` move no tokens. Each call succeeds as a whole, or raises and
    changes nothing: ValueError for a sequence that does not exist or was freed and for a length out
    of range, RuntimeError where pages run out. RuntimeError where the host module is not built.
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
    """The split-KV plan of a decode step over sequences of these lengths.

    A worker reads one split of one sequence's keys for one KV head. Splits are as equal in length
    as the lengths allow, and just short enough that all workers are busy: of two plans within a
    twentieth the one with fewer splits is taken.

    Args:
        lengths: keys of each sequence.
        heads: KV heads.
        workers: threads of a CPU, or multiprocessors of a GPU.
        tile: keys of a kernel's tile; splits are multiples of it.
        overhead: cost of one more split, in keys.
        max_groups: most calls that may serve the step. Sequences that need similar numbers of
            splits share one.

    Returns:
        `groups`, the longest sequences first: each has `sequences` (indices in the batch) and
        their `num_splits`; `keys_per_split`; and `efficiency`, the modelled share of the workers'
        time spent on keys.

    Raises:
        ValueError: an argument is below its least value.
        RuntimeError: the host module is not built.
    """
    plan: DecodePlan = _module().plan_decode(
        lengths, heads, workers, tile=tile, overhead=overhead, max_groups=max_groups
    )
    return plan

"""Compares what kernels are given by launchers and by replays, as the driver sees it: no GPU.

`python -m tests.driver_launches`, without TRITON_INTERPRET.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.driver_double import CAPABILITY, Double, Given
from resformer_kernels._core.op import TRITON
from tests.op_calls import OpCall, op_calls

NAMES = (
    "attention causal, grouped, sinks",
    "attention causal, grouped, sinks, backward",
    "attention packed",
    "kvcache split",
    "kvcache int8",
    "mix per head",
    "mix per head, backward",
    "embedding, backward",
    "scan batch, backward",
    "reservoir chunked",
)


def _call(given: OpCall, arguments: tuple[Any, ...]) -> Any:
    return getattr(getattr(torch.ops, TRITON), given.op.name).default(*arguments)


def _run(given: OpCall, double: Double) -> tuple[list[Tensor], list[Given]]:
    """(arguments and results, launches)."""
    arguments, results = given.again(), list[Any]()
    launches = double.launches(lambda: results.append(_call(given, arguments)))
    return [x for x in tree_leaves((arguments, results)) if isinstance(x, Tensor)], launches


def _place(address: int, tensors: list[Tensor]) -> tuple[int, int] | None:
    """(number, offset in bytes) of the tensor that holds an address."""
    for i, x in enumerate(tensors):
        start = x.data_ptr()
        if start <= address < start + x.untyped_storage().nbytes():
            return i, address - start
    return None


def compare(given: OpCall, double: Double) -> int:
    """AssertionError where a replay launches other kernels; the number of launches."""
    from resformer_kernels._triton import tape

    _call(given, given.again())
    tape.forget()
    tensors, launches = _run(given, double)
    _run(given, double)
    assert tape.LAUNCHERS[given.op.name].recorded == 1
    again, replayed = _run(given, double)
    assert len(launches) == len(replayed)
    for a, b in zip(launches, replayed, strict=True):
        assert (a.kernel, a.grid, a.rest) == (b.kernel, b.grid, b.rest), (a, b)
        for x, y in zip(a.pointers, b.pointers, strict=True):
            assert _place(x, tensors) == _place(y, again), (given.name, a.kernel)
            assert (x % 16, x == 0) == (y % 16, y == 0)
    return len(launches)


def main() -> None:
    """Compare, and print the number of launches of each call."""
    from resformer_kernels._triton import launch, tape

    calls = {given.name: given for given in op_calls()}
    with (
        tempfile.TemporaryDirectory() as folder,
        tape.everywhere(),
        launch.assumed_capability(CAPABILITY),
    ):
        double = Double(Path(folder))
        for name in NAMES:
            sys.stdout.write(f"{name}: {compare(calls[name], double)}\n")
        for compiled in launch.compiled_kernels():
            # Memory that Triton would ask for, outside of torch's.
            found: Any = compiled.metadata
            assert found.global_scratch_size + found.profile_scratch_size == 0, compiled.name


if __name__ == "__main__":
    main()

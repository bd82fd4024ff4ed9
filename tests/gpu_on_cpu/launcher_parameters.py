"""Compares the parameters that kernels are given here with those of Triton's launcher.

`python -m tests.gpu_on_cpu.launcher_parameters`, without TRITON_INTERPRET.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.driver_double import CAPABILITY, Double
from resformer_kernels._core.op import TRITON
from resformer_kernels._triton import launch
from resformer_kernels._triton.launch import Launch
from tests.gpu_on_cpu import launches
from tests.gpu_on_cpu.executor import packed
from tests.gpu_on_cpu.tensor_maps import BYTES
from tests.op_calls import op_calls

NAMES = (
    "attention causal, grouped, sinks, backward",
    "attention packed, gate",
    "kvcache int8",
    "scan packed, complex, backward",
    "reservoir chunked",
)
_CAPABILITY = 10 * CAPABILITY[0] + CAPABILITY[1]


def _as_noted(map_: bytes) -> bytes:
    """A tensor map in the form of the driver's double, without the type of its elements."""
    _, address, rank, _ = struct.unpack_from("<QQII", map_)
    sizes, strides = struct.unpack_from("<5Q", map_, 24), struct.unpack_from("<4Q", map_, 64)
    box, swizzle = struct.unpack_from("<5I", map_, 96), struct.unpack_from("<I", map_, 116)[0]
    words = [0] * 16
    words[0], words[1] = address, swizzle << 16 | rank
    for i in range(rank):
        words[2 + i] = sizes[i] << 20 | box[i]
    words[7 : 7 + rank - 1] = strides[: rank - 1]
    return struct.pack("<16Q", *words)


def _given(of: Launch) -> tuple[list[int], list[bytes]]:
    """(addresses, all other bytes), as the double tells them apart; scratch is not noted."""
    pointers, rest = [], []
    for parameter in launches.parameters(of, launches.compiled(of, _CAPABILITY))[:-2]:
        data = packed(launches.argument(parameter), launches.size_of(parameter))
        if parameter.kind == "map":
            data = _as_noted(data)
        if parameter.kind == "map" or parameter.kind[0] == "*":
            pointers.append(int.from_bytes(data[:8], "little"))
            data = data[8:]
        rest.append(data)
    return pointers, rest


def _untyped(data: bytes) -> bytes:
    """What is left of a tensor map after its address, without the type of its elements."""
    return data[:4] + bytes(4) + data[8:] if len(data) == BYTES - 8 else data


def compare(of: Launch, double: Double) -> int:
    """AssertionError where Triton's launcher gives a kernel something else; the number of maps."""

    def run() -> None:
        launch.launch(of.kernel, of.grid, torch.device("cpu"), **of.kwargs)

    run()
    (noted,) = double.launches(run)
    compiled = launches.compiled(of, _CAPABILITY)
    blocks = (*of.grid, 1, 1)[:3]
    threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    assert noted.grid == (*blocks, threads, shared), (noted.kernel, noted.grid)
    pointers, rest = _given(of)
    assert list(noted.pointers) == pointers, noted.kernel
    assert list(map(_untyped, noted.rest)) == rest, noted.kernel
    return sum(len(x) == BYTES - 8 for x in rest)


def main() -> None:
    """Compare, and print the number of launches and tensor maps of each call."""
    calls = {given.name: given for given in op_calls()}
    with tempfile.TemporaryDirectory() as folder, launch.assumed_capability(CAPABILITY):
        double = Double(Path(folder))
        for name in NAMES:
            given = calls[name]
            op: Any = getattr(getattr(torch.ops, TRITON), given.op.name).default
            with launch.recorded_launches() as recorded:
                kept = given.again(), op(*given.again())
            maps = sum(compare(one, double) for one in recorded)
            sys.stdout.write(f"{name}: {len(recorded)} launches, {maps} tensor maps\n")
            del kept


if __name__ == "__main__":
    main()

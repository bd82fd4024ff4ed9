"""Small kernels of PTX for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from tests.gpu_on_cpu.executor import Fault, Program, Report, Schedule

REGISTERS = """
    .reg .pred %p<16>;
    .reg .b16 %h<16>;
    .reg .b32 %r<64>;
    .reg .b64 %rd<32>;
    .reg .f32 %f<32>;
"""
SCHEDULES = (
    Schedule(),
    Schedule("random", "drawn", 1),
    Schedule("random", "late", 2),
    Schedule("warp_first", "late"),
    Schedule("warp_first", "early", 3),
    Schedule("block_first", "drawn", 4),
)
"""Every policy, and asynchronous work at every time."""


def module(body: str, tensors: Sequence[str] = ("out",), *, shared: int = 0, arch: int = 90) -> str:
    """A kernel `kernel` whose parameters are tensors: their addresses are in %rd0, %rd1, ..., the
    thread in %r0, its lane in %r1, its warp in %r2 and its block in %r3.

    `smem` is its shared memory, whose address is in %r4.
    """
    target = f"sm_{arch}{'a' if arch >= 90 else ''}"
    params = ", ".join(f".param .u64 .ptr .global .align 1 {name}" for name in tensors)
    loads = "\n".join(f"ld.param.u64 %rd{i}, [{name}];" for i, name in enumerate(tensors))
    place = f".shared .align 1024 .b8 smem[{shared}];\nmov.u32 %r4, smem;" if shared else ""
    return f"""
.version 8.7
.target {target}
.address_size 64
.visible .entry kernel({params}) {{
{REGISTERS}
{place}
{loads}
mov.u32 %r0, %tid.x;
and.b32 %r1, %r0, 31;
shr.u32 %r2, %r0, 5;
mov.u32 %r3, %ctaid.x;
{body}
ret;
}}
"""


def run(
    body: str,
    tensors: dict[str, Tensor],
    threads: int = 32,
    grid: int = 1,
    *,
    shared: int = 0,
    arch: int = 90,
    schedule: Schedule = Schedule(),  # noqa: B008 - immutable
    cooperative: bool = False,
    registers: int = 0,
) -> Report:
    """Run `module(body, ...)` on tensors."""
    return Program(module(body, tuple(tensors), shared=shared, arch=arch)).run(
        "kernel",
        grid,
        threads,
        list(tensors.values()),
        schedule=schedule,
        cooperative=cooperative,
        registers=registers,
    )


def fault_of(body: str, tensors: dict[str, Tensor], *arguments: Any, **options: Any) -> Fault:
    """The fault that `run` of the same has to end with."""
    with pytest.raises(Fault) as caught:
        run(body, tensors, *arguments, **options)
    return caught.value

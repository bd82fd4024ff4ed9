"""PTX that runs on the CPU: a Python face of the executor in `csrc/`.

    >>> program = Program(ptx)  # doctest: +SKIP
    >>> program.run("add", grid=1, threads=128, arguments=[out, x, 100])  # doctest: +SKIP

Tensors are given as they are: a kernel sees the storages of those that it is given, and nothing
else.
"""

from __future__ import annotations

import ctypes
import functools
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from tests.gpu_on_cpu import build
from tests.gpu_on_cpu.limits import LIMITS, Limits

Argument: TypeAlias = Tensor | int | float | bytes
"""Of a kernel: a tensor's address, a number in as many bytes as the parameter has, or bytes."""
POLICIES = ("round_robin", "random", "warp_first", "block_first")
WHEN = ("early", "late", "drawn")


class Schedule(NamedTuple):
    """The order in which a launch is executed; each is one that a GPU might take."""

    policy: str = "round_robin"
    """Of warps: one of POLICIES."""
    when: str = "early"
    """Asynchronous work is performed: one of WHEN."""
    seed: int = 0


class Site(NamedTuple):
    """An instruction, and who executed it; None where that is unknown."""

    kernel: str | None = None
    block: int | None = None
    warp: int | None = None
    lane: int | None = None
    instruction: str | None = None
    pc: int | None = None
    ptx_line: int | None = None
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        who = [
            f"{name} {value}"
            for name, value in (("block", self.block), ("warp", self.warp), ("lane", self.lane))
            if value is not None and value >= 0
        ]
        parts = [", ".join(who), f"`{self.instruction}`" if self.instruction else ""]
        if self.file:
            parts.append(f"{self.file}:{self.line}")
        if self.ptx_line:
            parts.append(f"line {self.ptx_line} of the PTX")
        return ", ".join(part for part in parts if part)


class Fault(Exception):
    """Something that a GPU leaves undefined or refuses, or PTX that is not modelled."""

    def __init__(
        self, kind: str, message: str, site: Site, other: Site | None, warps: Sequence[str]
    ) -> None:
        super().__init__(kind, message, site, other, tuple(warps))
        self.kind, self.message, self.site, self.other = kind, message, site, other
        self.warps = tuple(warps)
        """Where each warp stood, where none could go on."""

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.message}"]
        if self.site.kernel is not None:
            lines += [f"  kernel {self.site.kernel}", f"  by {self.site}"]
        if self.other is not None:
            lines.append(f"  and {self.other}")
        return "\n".join([*lines, *(f"  {warp}" for warp in self.warps)])


class Report(NamedTuple):
    """What a run that ended well did."""

    steps: int
    """Instructions of warps."""
    blocks_resident: int
    """The most at a time."""
    executed: dict[str, int]
    """Instructions of warps by opcode."""


class Param(NamedTuple):
    """A kernel's parameter."""

    name: str
    offset: int
    bytes: int
    align: int


class Kernel(NamedTuple):
    """What is known of a kernel before it runs."""

    name: str
    params: tuple[Param, ...]
    shared_bytes: int
    """Of static shared memory."""
    max_threads: int
    """Of a block; 0 where PTX does not say."""
    instructions: int
    max_registers: int

    @property
    def param_bytes(self) -> int:
        """Bytes of all parameters."""
        return max((x.offset + x.bytes for x in self.params), default=0)


class Region(ctypes.Structure):
    """Memory that a kernel may use: `gpu_region` of run.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("written", ctypes.c_void_p),
        ("writable", ctypes.c_uint64),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("params", ctypes.c_char_p),
        *((name, ctypes.c_uint64) for name in ("param_bytes", "seed", "most_steps")),
        *((name, 3 * ctypes.c_uint32) for name in ("grid", "threads")),
        *(
            (name, ctypes.c_uint32)
            for name in ("dynamic_shared", "registers", "cooperative", "policy", "when")
        ),
        ("limits", len(Limits._fields) * ctypes.c_uint32),
    )


class Program:
    """A module of PTX, parsed.

    Raises:
        Fault: of kind "unknown", where it has an instruction that is not modelled.
    """

    def __init__(self, ptx: str) -> None:
        self._handle: int | None = None
        report = ctypes.c_void_p()
        self._handle = _library().gpu_parse(ptx.encode(), ctypes.byref(report))
        if self._handle is None:
            raise _fault(_taken(report))
        _library().gpu_describe(self._handle, ctypes.byref(report))
        found = _taken(report)
        self.target: str = found["target"]
        """Such as sm_90a."""
        self.kernels = {x["name"]: _kernel(x) for x in found["kernels"]}

    def __del__(self) -> None:
        if self._handle is not None:
            _library().gpu_end(self._handle)

    @property
    def capability(self) -> int:
        """Compute capability of its target, major * 10 + minor."""
        return int(self.target.removeprefix("sm_").rstrip("af"))

    def run(
        self,
        kernel: str,
        grid: int | Sequence[int],
        threads: int | Sequence[int],
        arguments: bytes | Sequence[Argument],
        *,
        memory: Mapping[str, Tensor] | None = None,
        written: Mapping[int, Tensor] | None = None,
        read_only: AbstractSet[int] = frozenset(),
        dynamic_shared: int = 0,
        registers: int = 0,
        cooperative: bool = False,
        limits: Limits | None = None,
        schedule: Schedule = Schedule(),  # noqa: B008 - immutable
        most_steps: int = 0,
    ) -> Report:
        """Run `kernel` on a grid of blocks of so many threads.

        Args:
            arguments: one for each parameter, or the bytes of all.
            memory: further tensors that the kernel may use, by names for reports.
            written: which bytes of a storage somebody wrote, as a byte each, by the storage's
                address; updated. Every byte of a storage that is not there counts as written.
            read_only: storages that the kernel may not write, by address.
            registers: of a thread; with the rest they say how many blocks are resident.
            limits: of the GPU; by default those of the program's target.
            most_steps: instructions of warps after which the run is given up; 0: no bound.

        Raises:
            Fault: the kernel did something that no kernel may do.
        """
        given, tensors = self._packed(self.kernels[kernel], arguments)
        tensors.update(memory or {})
        regions = _regions(tensors, written or {}, read_only)
        launch = _Launch(
            params=given,
            param_bytes=len(given),
            seed=schedule.seed,
            most_steps=most_steps,
            grid=_three(grid),
            threads=_three(threads),
            dynamic_shared=dynamic_shared,
            registers=registers,
            cooperative=cooperative,
            policy=POLICIES.index(schedule.policy),
            when=WHEN.index(schedule.when),
            limits=tuple(limits or LIMITS[self.capability]),
        )
        report = ctypes.c_void_p()
        failed = _library().gpu_run(
            *(self._handle, kernel.encode(), ctypes.byref(launch)),
            *(regions, len(regions), ctypes.byref(report)),
        )
        found = _taken(report)
        if failed:
            raise _fault(found)
        return Report(**{name: found[name] for name in Report._fields})

    def resident(
        self,
        kernel: str,
        threads: int | Sequence[int],
        *,
        dynamic_shared: int = 0,
        registers: int = 0,
        limits: Limits | None = None,
    ) -> int:
        """Blocks that a multiprocessor holds at a time; the arguments are those of `run`."""
        launch = _Launch(
            threads=_three(threads),
            dynamic_shared=dynamic_shared,
            registers=registers,
            limits=tuple(limits or LIMITS[self.capability]),
        )
        report = ctypes.c_void_p()
        failed = _library().gpu_resident(
            *(self._handle, kernel.encode(), ctypes.byref(launch), ctypes.byref(report))
        )
        found = _taken(report)
        if failed:
            raise _fault(found)
        return int(found["blocks"])

    def _packed(
        self, kernel: Kernel, arguments: bytes | Sequence[Argument]
    ) -> tuple[bytes, dict[str, Tensor]]:
        """(the bytes of all parameters, the tensors among them)."""
        if isinstance(arguments, bytes):
            return arguments, {}
        data = bytearray(kernel.param_bytes)
        tensors = {}
        for param, value in zip(kernel.params, arguments, strict=True):
            data[param.offset : param.offset + param.bytes] = packed(value, param.bytes)
            if isinstance(value, Tensor):
                tensors[param.name] = value
        return bytes(data), tensors


def packed(value: Argument, size: int) -> bytes:
    """An argument in `size` bytes."""
    if isinstance(value, Tensor):
        value = value.data_ptr()
    if isinstance(value, bytes):
        found = value
    elif isinstance(value, float):
        found = struct.pack({4: "<f", 8: "<d"}[size], value)
    else:
        found = (value % (1 << (8 * size))).to_bytes(size, "little")
    if len(found) != size:
        raise ValueError(f"an argument of {len(found)} bytes for a parameter of {size}")
    return found


def nothing_written(*tensors: Tensor) -> dict[int, Tensor]:
    """`written` of `Program.run` for tensors whose storages nobody wrote."""
    storages = (x.untyped_storage() for x in tensors)
    return {x.data_ptr(): torch.zeros(x.nbytes(), dtype=torch.uint8) for x in storages}


def _regions(
    tensors: Mapping[str, Tensor], written: Mapping[int, Tensor], read_only: AbstractSet[int]
) -> ctypes.Array[Region]:
    """The storages of tensors, each once."""
    found: dict[int, Region] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in found:
            continue
        marks = written.get(address)
        if marks is not None and (marks.dtype, marks.numel()) != (torch.uint8, size):
            raise ValueError(f"{name}: `written` needs a byte for each of {size}")
        place = None if marks is None else marks.data_ptr()
        found[address] = Region(name.encode(), address, size, place, address not in read_only)
    return (Region * len(found))(*found.values())


def _three(sizes: int | Sequence[int]) -> tuple[int, ...]:
    return (*((sizes,) if isinstance(sizes, int) else sizes), 1, 1)[:3]


def _kernel(found: Mapping[str, Any]) -> Kernel:
    params = tuple(Param(**{name: x[name] for name in Param._fields}) for x in found["params"])
    numbers = ("shared_bytes", "max_threads", "instructions", "max_registers")
    return Kernel(found["name"], params, *(found[name] for name in numbers))


def _fault(found: Mapping[str, Any]) -> Fault:
    fault = found["fault"]
    other = fault.get("other")
    return Fault(
        fault["kind"],
        fault["message"],
        _site(fault),
        None if other is None else _site(other),
        fault.get("warps") or (),
    )


def _site(found: Mapping[str, Any]) -> Site:
    return Site(*(found.get(name) for name in Site._fields))


def _taken(report: ctypes.c_void_p) -> Any:
    """A report, which is freed."""
    text = ctypes.string_at(report.value or 0)
    _library().gpu_free(report)
    return json.loads(text)


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.library()))
    pointer, out = ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
    forms: Iterable[tuple[str, Any, tuple[Any, ...]]] = (
        ("gpu_parse", pointer, (ctypes.c_char_p, out)),
        ("gpu_describe", None, (pointer, out)),
        (
            "gpu_run",
            ctypes.c_int,
            (
                *(pointer, ctypes.c_char_p, ctypes.POINTER(_Launch)),
                *(ctypes.POINTER(Region), ctypes.c_uint32, out),
            ),
        ),
        (
            "gpu_resident",
            ctypes.c_int,
            (pointer, ctypes.c_char_p, ctypes.POINTER(_Launch), out),
        ),
        ("gpu_end", None, (pointer,)),
        ("gpu_free", None, (pointer,)),
    )
    for name, result, arguments in forms:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library

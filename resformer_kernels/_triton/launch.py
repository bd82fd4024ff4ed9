"""The host side of every Triton kernel: allocating outputs, launching, and who else may launch."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from resformer_kernels._triton import arch
from resformer_kernels._triton.arch import STAND_IN, capability_of
from resformer_kernels._triton.specialise import identity, specialised


class Launch(NamedTuple):
    """One launch of a kernel: `kernel[grid](**kwargs)`."""

    kernel: Any
    grid: tuple[int, ...]
    kwargs: dict[str, Any]


class Taker(Protocol):
    """What runs this thread's launches, and takes note of them: see `tape`."""

    def take(self, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        """Do `run(*arguments)`."""


class Assumed(NamedTuple):
    """The GPU that launchers choose for, whatever their tensors are on."""

    capability: tuple[int, int]
    multiprocessors: int | None = None
    """None: as many as without it."""


class Elsewhere(NamedTuple):
    """What is called in the place of launches."""

    run: Callable[[Launch], None]
    allocated: Callable[[Tensor], None]
    """Of memory for a kernel to write."""


_assumed: Assumed | None = None
_elsewhere: Elsewhere | None = None
_compiled: dict[Any, Any] = {}
_thread = threading.local()
MOST_REGISTERS = 255
"""The option `maxnreg` of kernels of few warps: without it ptxas spills registers to reach 128 or
168 of them, as if more warps a multiprocessor were worth that."""
POISON = "RESFORMER_POISON"


@contextmanager
def assumed_capability(
    capability: tuple[int, int], multiprocessors: int | None = None
) -> Iterator[None]:
    """Within it launchers choose for a GPU of that compute capability, and of so many
    multiprocessors, whatever their tensors are on."""
    global _assumed
    before, _assumed = _assumed, Assumed(capability, multiprocessors)
    try:
        yield
    finally:
        _assumed = before


def assumed() -> Assumed | None:
    """The GPU of `assumed_capability`."""
    return _assumed


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability to choose for; without a GPU the interpreter plays an H100."""
    if _assumed is not None:
        return _assumed.capability
    return capability_of(device) if device.type == "cuda" else STAND_IN


def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors to choose for."""
    if _assumed is not None and _assumed.multiprocessors is not None:
        return _assumed.multiprocessors
    return arch.multiprocessors(device)


@contextmanager
def launched_by(
    run: Callable[[Launch], None], allocated: Callable[[Tensor], None] | None = None
) -> Iterator[None]:
    """Within it launched kernels do not run: `run` is given their launches.

    `allocated` is given the memory that launchers allocate for kernels to write, before those.
    """
    global _elsewhere
    before, _elsewhere = _elsewhere, Elsewhere(run, allocated or (lambda _: None))
    try:
        yield
    finally:
        _elsewhere = before


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within it launched kernels do not run: their launches are appended to the list it yields.

    Launchers may be given meta tensors: their storage offsets stand for their alignment.
    """
    launches: list[Launch] = []
    with launched_by(launches.append):
        yield launches


def redirected() -> bool:
    """Whether launches go elsewhere than to a GPU, or to Triton's interpreter."""
    return _elsewhere is not None


@contextmanager
def taken_by(taker: Taker) -> Iterator[None]:
    """Within it `taker` runs this thread's launches."""
    _thread.taker = taker
    try:
        yield
    finally:
        _thread.taker = None


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, **arguments: Any) -> None:
    """Run `kernel` on `device`, or where launches go; nothing where the grid is empty."""
    if 0 in grid:
        return
    if _elsewhere is not None:
        _elsewhere.run(Launch(kernel, grid, arguments))
        return
    if triton.knobs.runtime.interpret:
        run, values = _interpreted(kernel, grid, tuple(arguments)), tuple(arguments.values())
    else:
        with on(device):
            run = _compiled_runner(_compile(kernel, arguments, device), grid, device)
        values = tuple(arguments.get(x.name, x.default) for x in kernel.params)
    taker: Taker | None = getattr(_thread, "taker", None)
    with on(device):
        if taker is None:
            run(*values)
        else:
            taker.take(run, values)


def _interpreted(kernel: Any, grid: tuple[int, ...], names: tuple[str, ...]) -> Callable[..., None]:
    def run(*values: object) -> None:
        import numpy

        # numpy warns where a GPU goes on (inf - inf, an overflowing exponential, a NaN), and about
        # the interpreter's use of it.
        with numpy.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernel[grid](**dict(zip(names, values, strict=True)))

    return run


def _compile(kernel: Any, arguments: dict[str, Any], device: torch.device) -> Any:
    """The kernel that Triton compiles for a GPU, once."""
    key = (identity(kernel, arguments), device)
    compiled = _compiled.get(key)
    if compiled is None:
        target = driver.active.get_current_target()
        compiled = _compiled[key] = compiled_for(target, kernel, arguments)
    return compiled


def compiled_for(target: Any, kernel: Any, arguments: dict[str, Any]) -> Any:
    """The kernel that Triton compiles for a launch on a GPUTarget."""
    found = specialised(kernel, arguments)
    source = ASTSource(kernel, found.signature, found.constants, found.attrs)
    options = {"debug": triton.knobs.runtime.debug, **found.options}
    return triton.compile(source, target=target, options=options)


def _compiled_runner(
    compiled: Any, grid: tuple[int, ...], device: torch.device
) -> Callable[..., None]:
    """`compiled[grid]`, without what Triton prepares for profilers where there are none."""
    x, y, z = (*grid, 1, 1)[:3]
    for_profilers, hooks = compiled[x, y, z], triton.knobs.runtime
    launcher, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    stream_of, index = driver.active.get_current_stream, device.index

    def run(*values: object) -> None:
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            for_profilers(*values)
        else:
            stream = stream_of(index)
            launcher(x, y, z, stream, function, metadata, None, None, None, *values)

    return run


def compiled_kernels() -> Iterable[Any]:
    """Every kernel that was compiled for a launch of this process, as Triton has it."""
    return _compiled.values()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which `device` is the current one, if it is a GPU."""
    return nullcontext() if current(device) else torch.cuda.device(device)


def current(device: torch.device) -> bool:
    """Whether launches go to `device` as things are."""
    return device.type != "cuda" or device.index == torch.cuda.current_device()


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a kernel to write: uninitialised, or NaN under RESFORMER_POISON=1 where its dtype
    has one."""
    fresh = like.new_empty(shape, dtype=dtype)
    if os.environ.get(POISON) and (fresh.is_floating_point() or fresh.is_complex()):
        fresh.fill_(torch.nan)
    if _elsewhere is not None:
        _elsewhere.allocated(fresh)
    return fresh

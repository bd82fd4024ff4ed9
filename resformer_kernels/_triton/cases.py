"""Compile Triton kernels for GPUs that are not there, and read what came out.

A `CompileCase` is one kernel with one configuration, specialised exactly as its launch would be. An
op lists its cases in `triton_cases.py`, as `compile_cases(capability) -> Iterator[CompileCase]`.
The cases come from the launchers themselves: `recorded_launches` catches what a launcher passes
when it is called on meta tensors, and `case_from_launch` derives types, constants and divisibility
from that with the code that Triton runs at a launch. Nobody keeps a second list.

Nothing here imports Triton before it is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

CAPABILITIES = (80, 90, 100)
"""The architectures that every kernel is compiled for, as major * 10 + minor."""

WARP = 32
"""Threads."""


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration, as a launch would compile it."""

    name: str
    """Unique within its op: what stands in the table, such as "forward D128 causal bfloat16"."""
    kernel: Any
    """The function that `triton.jit` returned."""
    signature: dict[str, str]
    """Triton's type of each argument, by name; "constexpr" for constants."""
    constants: dict[tuple[int, ...], Any]
    """Constant arguments, by position."""
    attrs: dict[tuple[int, ...], list[list[Any]]]
    """Attributes such as divisibility by 16, by position."""
    num_warps: int = 4
    num_stages: int = 3
    main: bool = False
    """Whether this is a main configuration, one that must not spill."""
    expects_mma: bool = False
    """Whether its products have to run on the matrix units (wgmma on sm_90)."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the compiler, such as maxnreg."""


@dataclass(frozen=True)
class Launch:
    """What a launcher handed to Triton: `kernel[grid](*args, **kwargs)`."""

    kernel: Any
    grid: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within it, a kernel that is launched does not run: its launch is added to the list.

    The launcher may be given meta tensors: their storage offsets stand for their alignment.

    >>> with recorded_launches() as launches:  # doctest: +SKIP
    ...     launch_forward(torch.empty(1, 4096, 16, 128, device="meta", dtype=torch.bfloat16), ...)
    >>> case = case_from_launch("forward D128", launches[0], capability=90)  # doctest: +SKIP
    """
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        del warmup
        launches.append(Launch(kernel, grid, args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def case_from_launch(
    name: str, launch: Launch, *, capability: int, main: bool = False, expects_mma: bool = False
) -> CompileCase:
    """`case_from_call` of a recorded launch."""
    return case_from_call(
        name,
        launch.kernel,
        launch.args,
        launch.kwargs,
        capability=capability,
        main=main,
        expects_mma=expects_mma,
    )


def case_from_call(
    name: str,
    kernel: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    capability: int,
    main: bool = False,
    expects_mma: bool = False,
) -> CompileCase:
    """The case that `kernel[grid](*args, **kwargs)` would compile on `capability`.

    Args:
        name: of the case.
        kernel: what `triton.jit` returned.
        args: positional arguments of the launch. Tensors may be on the meta device.
        kwargs: keyword arguments of the launch: constants, num_warps, num_stages and the like.
        capability: compute capability as major * 10 + minor.
        main: whether it must not spill.
        expects_mma: whether its products have to run on the matrix units.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", capability, WARP))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, extra = binder(*args, **kwargs)
    options, signature, constants, attrs = kernel._pack_args(
        backend, dict(kwargs), bound, specialization, extra
    )
    asked = {key: value for key, value in extra.items() if key not in ("num_warps", "num_stages")}
    return CompileCase(
        name,
        kernel,
        signature,
        constants,
        attrs,
        options.num_warps,
        options.num_stages,
        main,
        expects_mma,
        asked,
    )

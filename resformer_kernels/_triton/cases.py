"""Compile cases: Triton kernels to compile for GPUs that need not be present.

A `CompileCase` is one kernel in one configuration, specialised exactly as its launch would be. An
op lists its cases in `triton/cases.py`, as `compile_cases(capability) -> Iterator[CompileCase]`.
They come from the launchers themselves: `launch.recorded_launches` records what a launcher passes
when it is called on meta tensors, and `case_from_launch` derives types, constants and divisibility
with the code that runs at a launch. Nobody maintains a second list.

Triton is imported when a function is called, not with this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from resformer_kernels._triton import arch

if TYPE_CHECKING:
    from resformer_kernels._triton.launch import Launch


@dataclass(frozen=True)
class CompileCase:
    """One kernel in one configuration, as a launch would compile it."""

    name: str
    """Unique within its op, such as "forward D128 causal bfloat16"."""
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


def gpu_target(capability: int) -> Any:
    """Triton's target for an architecture of `arch.ARCHITECTURES`."""
    from triton.backends.compiler import GPUTarget

    warp = arch.ARCHITECTURES[capability].warp
    if arch.is_amd(divmod(capability, 10)):
        return GPUTarget("hip", arch.label(capability), warp)
    return GPUTarget("cuda", capability, warp)


def case_from_launch(
    name: str, launch: Launch, *, capability: int, main: bool = False, expects_mma: bool = False
) -> CompileCase:
    """The case that a recorded launch would compile on `capability`, major * 10 + minor.

    >>> with recorded_launches() as launches:  # doctest: +SKIP
    ...     launch_forward(torch.empty(1, 4096, 16, 128, device="meta", dtype=torch.bfloat16), ...)
    >>> case = case_from_launch("forward D128", launches[0], capability=90)  # doctest: +SKIP
    """
    from triton.compiler.compiler import make_backend

    from resformer_kernels._triton.specialise import specialised

    found = specialised(launch.kernel, launch.kwargs)
    options = make_backend(gpu_target(capability)).parse_options(found.options)
    extra = {key: x for key, x in found.options.items() if key not in ("num_warps", "num_stages")}
    return CompileCase(
        name,
        launch.kernel,
        found.signature,
        found.constants,
        found.attrs,
        options.num_warps,
        options.num_stages,
        main,
        expects_mma,
        extra,
    )

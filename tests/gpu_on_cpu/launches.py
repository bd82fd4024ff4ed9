"""Launches of Triton kernels, recorded by `_triton.launch`, run by the executor.

A launch is compiled as `resformer-kernels compile-check` and a real launch compile it; parameters
are laid out as Triton's launcher gives them to the driver. Needs a process without
TRITON_INTERPRET.
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from resformer_kernels._triton.cases import gpu_target
from resformer_kernels._triton.launch import Launch, compiled_for
from resformer_kernels._triton.specialise import identity
from resformer_kernels.cli.compile.artifacts import printed_by
from tests.gpu_on_cpu.executor import Argument, Program, Report, Schedule
from tests.gpu_on_cpu.limits import Limits
from tests.gpu_on_cpu.tensor_maps import BYTES as MAP_BYTES
from tests.gpu_on_cpu.tensor_maps import map_of

Edit = Callable[[str], str]
_REGISTERS = re.compile(r"REG:(\d+)")
_SIZES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "fp32": 4, "fp64": 8}
_FLOATS = ("fp32", "fp64")
_DESCRIPTOR = "tensordesc"


class Compiled(NamedTuple):
    """A kernel as Triton compiled it for a launch."""

    name: str
    ptx: str
    signature: dict[str, Any]
    """Types of the parameters by name, as `specialised` gives them."""
    metadata: Any
    registers: int
    """Of a thread, as ptxas allotted them."""


class Parameter(NamedTuple):
    """One parameter of the compiled kernel."""

    name: str
    value: Any
    kind: str
    """Triton's type; "map" for a tensor map."""


_compiled: dict[Any, Compiled] = {}


def compiled(launch: Launch, capability: int) -> Compiled:
    """What a launch compiles for an architecture, once."""
    key = (identity(launch.kernel, launch.kwargs), capability)
    if key not in _compiled:
        artifact = compiled_for(gpu_target(capability), launch.kernel, launch.kwargs)
        found = artifact.metadata
        if found.global_scratch_size or found.profile_scratch_size or found.num_ctas != 1:
            raise NotImplementedError(f"{found.name}: scratch memory, or clusters of blocks")
        _compiled[key] = Compiled(
            found.name,
            artifact.asm["ptx"],
            artifact.src.signature,
            found,
            _registers(artifact.asm["cubin"]),
        )
    return _compiled[key]


def _registers(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        path = str(Path(file.name))
        usage = printed_by(triton.knobs.nvidia.cuobjdump.path, "-res-usage", path)
    found = _REGISTERS.search(usage)
    assert found is not None, usage
    return int(found[1])


def parameters(launch: Launch, found: Compiled) -> list[Parameter]:
    """A compiled kernel's parameters, in order: tuples flattened, constants left out, a tensor
    descriptor as its map, its shape and its strides, and at last two pointers to no scratch."""
    metas = iter(found.metadata.tensordesc_meta or ())
    result: list[Parameter] = []
    for parameter in launch.kernel.params:
        value = launch.kwargs.get(parameter.name, parameter.default)
        kind = found.signature[parameter.name]
        for name, one, its_kind in _flat(parameter.name, value, kind):
            if its_kind.startswith(_DESCRIPTOR):
                result += _described(name, one, next(metas))
            else:
                result.append(Parameter(name, one, its_kind))
    assert next(metas, None) is None
    return [*result, Parameter("global scratch", 0, "i64"), Parameter("profile scratch", 0, "i64")]


def _flat(name: str, value: Any, kind: Any) -> Iterator[tuple[str, Any, str]]:
    if isinstance(kind, tuple):
        names = getattr(value, "_fields", range(len(value)))
        for field, one, its_kind in zip(names, value, kind, strict=True):
            yield from _flat(f"{name}.{field}", one, its_kind)
    elif kind != "constexpr":
        yield name, value, kind


def _described(name: str, descriptor: TensorDescriptor, meta: Any) -> Iterator[Parameter]:
    if meta is None:
        raise NotImplementedError(f"{name}: a tensor descriptor that is no tensor map")
    yield Parameter(name, (descriptor, meta), "map")
    for i, size in enumerate(descriptor.shape):
        yield Parameter(f"{name}.shape[{i}]", size, "i32")
    for i, stride in enumerate(descriptor.strides):
        yield Parameter(f"{name}.strides[{i}]", stride, "i64")


def argument(parameter: Parameter) -> Argument:
    """A parameter's value as `Program.run` takes it; tensors as addresses, for `tensors` names
    them."""
    value, kind = parameter.value, parameter.kind
    if kind == "map":
        return map_of(*value)
    if kind[0] == "*":
        return int(value.data_ptr())
    return float(value) if kind in _FLOATS else int(value)


def size_of(parameter: Parameter) -> int:
    """The bytes of a parameter."""
    if parameter.kind == "map":
        return MAP_BYTES
    return 8 if parameter.kind[0] == "*" else _SIZES[parameter.kind.replace("u", "i")]


def tensors(of: list[Parameter]) -> dict[str, Tensor]:
    """The tensors that parameters point to, by name."""
    found: dict[str, Tensor] = {}
    for parameter in of:
        if parameter.kind == "map":
            found[parameter.name] = parameter.value[0].base
        elif parameter.kind[0] == "*":
            found[parameter.name] = parameter.value
    return found


@functools.lru_cache(maxsize=64)
def _program(ptx: str) -> Program:
    return Program(ptx)


def execute(
    launch: Launch,
    capability: int,
    *,
    schedule: Schedule,
    limits: Limits | None = None,
    written: Callable[[Tensor], Tensor | None] = lambda _: None,
    edit: Edit | None = None,
) -> Report:
    """Compile a launch for an architecture and run it.

    Args:
        written: which bytes of a tensor's storage somebody wrote; None: all.
        edit: changes the PTX.

    Raises:
        Fault: see `executor`.
    """
    found = compiled(launch, capability)
    program = _program(found.ptx if edit is None else edit(found.ptx))
    given = parameters(launch, found)
    sizes = [param.bytes for param in program.kernels[found.name].params]
    if sizes != [size_of(x) for x in given]:
        raise RuntimeError(f"{found.name} has parameters of {sizes} bytes: not those of a launch")
    memory = tensors(given)
    marks = {x.untyped_storage().data_ptr(): written(x) for x in memory.values()}
    return program.run(
        found.name,
        launch.grid,
        32 * found.metadata.num_warps,
        [argument(x) for x in given],
        memory=memory,
        written={address: x for address, x in marks.items() if x is not None},
        dynamic_shared=found.metadata.shared,
        registers=found.registers,
        cooperative=found.metadata.launch_cooperative_grid,
        limits=limits,
        schedule=schedule,
    )

"""The libraries that run AMX's instructions on a processor without them."""

from __future__ import annotations

import fcntl
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from build_support import native

HERE = Path(__file__).resolve().parent
OBJECTS = native.ROOT / f"build/native-{platform.machine()}"


class Libraries(NamedTuple):
    """`trap` emulates the instructions, `products` has the products of gemm_amx.h, and `kernels` is
    the library that ships but for the check that AMX is there: its objects are the same files."""

    trap: Path
    products: Path
    kernels: Path


def build(folder: Path) -> Libraries:
    """Compile into `folder` what is not there yet."""
    folder.mkdir(exist_ok=True)
    libraries = Libraries(*(folder / f"{name}.so" for name in Libraries._fields))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all(library.exists() for library in libraries):
            with ThreadPoolExecutor() as pool:
                list(pool.map(_run, _commands(libraries, folder / "amx_cpu.o")))
            _run(_link(libraries.kernels, folder / "amx_cpu.o"))
    return libraries


def _commands(libraries: Libraries, check: Path) -> list[list[str]]:
    tools = native.find_toolchain()
    flags = [*shlex.split(tools.cxx), *native.cpu_flags(tools)[0]]
    visible = ["-fvisibility=default", "-shared"]
    units = native.cpu_units(native.ROOT, platform.machine())
    amx = next(unit.flags for unit in units if unit.label == "[avx512_amx]")
    trap = ["-ffp-contract=off", "-mavx512f", "-mfma", *visible, str(HERE / "trap.cpp")]
    products = [*amx, *visible, str(HERE / "products.cpp")]
    emulated = ["-DRESFORMER_EMULATE_AMX", "-c", "csrc/common/amx_cpu.cpp"]
    return [
        [*flags, *trap, "-o", str(libraries.trap)],
        [*flags, *products, "-o", str(libraries.products)],
        [*flags, *emulated, "-o", str(check)],
    ]


def _link(kernels: Path, check: Path) -> list[str]:
    tools = native.find_toolchain()
    units = native.cpu_units(native.ROOT, platform.machine())
    names = [unit.object for unit in units if unit.object != "csrc/common/amx_cpu.o"]
    objects = [str(OBJECTS / name) for name in names]
    command = [*shlex.split(tools.cxx), "-shared", "-o", str(kernels), *objects, str(check)]
    return [*command, *native.cpu_flags(tools)[1]]


def _run(command: list[str]) -> None:
    result = subprocess.run(command, cwd=native.ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

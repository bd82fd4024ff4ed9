"""The CUDA library: whether it is built, by which nvcc, and for which architectures.

Building needs nvcc but no GPU. torch can be a CPU build: its headers are the same.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from build_support.errors import BuildError

LIBRARY = "libresformer_cuda.so"
ARCHITECTURES = ("8.0", "9.0a", "10.0")
"""Ampere and later; Hopper with its architecture-specific features; datacentre Blackwell."""
PTX = "+PTX"
"""Marks an architecture of which the library holds PTX."""

_USUAL_HOME = "/usr/local/cuda"
_ARCHITECTURE = re.compile(r"(\d+)\.(\d)([af]?)")

_FLAGS = (
    "-O3",
    "-std=c++20",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    # torch's headers declare the CUDA part of their C interface under this macro.
    "-DUSE_CUDA",
)


def skip_reason(environ: Mapping[str, str] = os.environ) -> str | None:
    """Why the CUDA library is not built; None where it is.

    Raises BuildError where it is required and cannot be built.
    """
    requested = environ.get("RESFORMER_CUDA", "")
    if requested not in ("", "0", "1"):
        raise BuildError(f"RESFORMER_CUDA must be 0 or 1, got {requested!r}")
    if requested == "0":
        return "RESFORMER_CUDA=0"
    if find_nvcc(environ) is not None:
        return None
    missing = f"nvcc was not found (looked for {_wanted(environ)})"
    if requested == "1":
        raise BuildError(
            f"RESFORMER_CUDA=1 asks for the CUDA library, but {missing}."
            " Install the CUDA toolkit, or name its folder in CUDA_HOME."
        )
    return missing


def _wanted(environ: Mapping[str, str]) -> str:
    home = environ.get("CUDA_HOME", "")
    return f"CUDA_HOME={home}" if home else f"nvcc on PATH and in {_USUAL_HOME}/bin"


def find_nvcc(environ: Mapping[str, str] = os.environ) -> str | None:
    """The CUDA compiler: in $CUDA_HOME if that is set, else on PATH, else in /usr/local/cuda."""
    home = environ.get("CUDA_HOME", "")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    return on_path or shutil.which("nvcc", path=f"{_USUAL_HOME}/bin")


def architectures(nvcc: str, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The architectures to build for, such as "9.0a": those of RESFORMER_CUDA_ARCHS, else those of
    `ARCHITECTURES` that this nvcc supports. BuildError for a requested one that it does not."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False)
    if known.returncode != 0:
        raise BuildError(f"{nvcc} --list-gpu-code failed: {known.stderr.strip()}")
    codes = set(known.stdout.split())
    requested = re.split(r"[\s,;]+", environ.get("RESFORMER_CUDA_ARCHS", "").strip(" ,;"))
    if requested == [""]:
        found = tuple(name for name in ARCHITECTURES if _plain_code(name) in codes)
        if not found:
            raise BuildError(f"{nvcc} knows none of {', '.join(ARCHITECTURES)}")
        return found
    for name in requested:
        if _ARCHITECTURE.fullmatch(name) is None:
            raise BuildError(
                "RESFORMER_CUDA_ARCHS must be a list of architectures such as"
                f" {' '.join(ARCHITECTURES)}, got {name!r}"
            )
        if _plain_code(name) not in codes:
            raise BuildError(
                f"RESFORMER_CUDA_ARCHS names {name}, which {nvcc} does not know; it knows"
                f" {' '.join(sorted(codes))}"
            )
    return tuple(dict.fromkeys(requested))


def _plain_code(architecture: str) -> str:
    # nvcc --list-gpu-code omits the variants.
    return code(architecture).rstrip("af")


def holds(archs: tuple[str, ...]) -> tuple[str, ...]:
    """What a library for `archs` has: their code, and PTX of the newest that has no variant.

    A driver compiles PTX for GPUs that are newer than every architecture here; that of a variant
    such as 9.0a it takes for no other GPU.
    """
    plain = [name for name in archs if name[-1].isdigit()]
    newest = max(plain, key=lambda name: [int(part) for part in name.split(".")], default=None)
    return archs if newest is None else (*archs, f"{newest}{PTX}")


def code(architecture: str) -> str:
    """nvcc's name: sm_90a for "9.0a"."""
    return "sm_" + architecture.replace(".", "")


def compile_flags(archs: tuple[str, ...], cxx: str, torch: Path) -> list[str]:
    """nvcc's flags: machine code of each architecture, and PTX where `holds` has it."""
    targets = []
    for name in holds(archs):
        virtual = code(name.removesuffix(PTX)).replace("sm", "compute")
        real = virtual if name.endswith(PTX) else code(name)
        targets.append(f"-gencode=arch={virtual},code={real}")
    return [
        *_FLAGS,
        *host_compiler(cxx),
        *targets,
        f"-DRESFORMER_CUDA_ARCHS={' '.join(holds(archs))}",
        *("-Icsrc", "-isystem", str(torch / "include")),
    ]


def link_flags(cxx: str, torch: Path) -> list[str]:
    """nvcc's flags for linking.

    The CUDA runtime is linked statically and hidden, so that torch's own can be any version.
    libtorch is linked although no symbol of it is used: in a CUDA build of torch it loads
    libtorch_cuda, in a CPU build it does not, and the library loads in both.
    """
    library_dir = torch / "lib"
    linker = (
        *("--exclude-libs,ALL", "-z,defs", f"-rpath-link,{library_dir}", "--no-as-needed"),
        *("-ltorch", "--as-needed"),
    )
    return [
        *host_compiler(cxx),
        # No device code calls another file's, so device linking is unnecessary.
        *("-cudart=static", "-nodlink"),
        f"-L{library_dir}",
        *(f"-Xlinker={flag}" for flag in linker),
        *("-ltorch_cpu", "-lc10"),
    ]


def host_compiler(cxx: str) -> list[str]:
    """Select the CPU library's C++ compiler, unless it is a command of several words."""
    return [] if " " in cxx else [f"-ccbin={cxx}"]

"""The CUDA library: whether it is built, by which nvcc, and for which architectures.

A machine that builds needs nvcc; it needs no GPU, and its torch may be a CPU build, whose headers
are the same.
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
"""Ampere and later; Hopper with what only it has; datacentre Blackwell."""

_USUAL_HOME = "/usr/local/cuda"
_ARCHITECTURE = re.compile(r"(\d+)\.(\d)([af]?)")

_FLAGS = (
    "-O3",
    "-std=c++20",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    # Declares the CUDA part of torch's C interface.
    "-DUSE_CUDA",
)


def skip_reason(environ: Mapping[str, str] = os.environ) -> str | None:
    """Why the CUDA library is not to be built; None where it is. BuildError where it must be and
    cannot."""
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
    """The CUDA compiler: that of $CUDA_HOME if it is set, else of PATH, else the usual place's."""
    home = environ.get("CUDA_HOME", "")
    if home:
        return shutil.which("nvcc", path=str(Path(home) / "bin"))
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    return on_path or shutil.which("nvcc", path=f"{_USUAL_HOME}/bin")


def architectures(nvcc: str, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The architectures to build for, such as "9.0a": those of RESFORMER_CUDA_ARCHS, else of
    `ARCHITECTURES` those that this nvcc knows. BuildError for one that it does not know."""
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
    # nvcc lists no variants.
    return code(architecture).rstrip("af")


def code(architecture: str) -> str:
    """nvcc's name: sm_90a for "9.0a"."""
    return "sm_" + architecture.replace(".", "")


def compile_flags(archs: tuple[str, ...], cxx: str, torch: Path) -> list[str]:
    """What nvcc is called with. Each architecture gets machine code, and nothing else is in."""
    targets = [
        f"-gencode=arch={code(name).replace('sm', 'compute')},code={code(name)}" for name in archs
    ]
    return [
        *_FLAGS,
        *host_compiler(cxx),
        *targets,
        f"-DRESFORMER_CUDA_ARCHS={' '.join(archs)}",
        *("-Icsrc", "-isystem", str(torch / "include")),
    ]


def link_flags(cxx: str, torch: Path) -> list[str]:
    """The CUDA runtime goes in, hidden, so that torch's own may be any version. libtorch stays
    needed though nothing names it: in a CUDA build of torch it brings libtorch_cuda, in a CPU
    build it does not, and the library loads in both."""
    library_dir = torch / "lib"
    linker = (
        *("--exclude-libs,ALL", "-z,defs", f"-rpath-link,{library_dir}", "--no-as-needed"),
        *("-ltorch", "--as-needed"),
    )
    return [
        *host_compiler(cxx),
        # Nothing is called from another file's device code.
        *("-cudart=static", "-nodlink"),
        f"-L{library_dir}",
        *(f"-Xlinker={flag}" for flag in linker),
        *("-ltorch_cpu", "-lc10"),
    ]


def host_compiler(cxx: str) -> list[str]:
    """The same C++ compiler as for the CPU, unless it is a command line of several words."""
    return [] if " " in cxx else [f"-ccbin={cxx}"]

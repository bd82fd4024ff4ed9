"""Build the executor with ninja: `python -m tests.gpu_on_cpu.build`, and by itself where needed."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from build_support.native import ROOT

SOURCES = Path(__file__).parent / "csrc"
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++20",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Werror",
    # A multiplication and an addition are one operation only where PTX says so.
    "-ffp-contract=off",
    "-frounding-math",
    "-fno-trapping-math",
)


def folder() -> Path:
    """Where objects and the library are: GPU_ON_CPU_BUILD, or build/gpu_on_cpu."""
    return Path(os.environ.get("GPU_ON_CPU_BUILD", ROOT / "build" / "gpu_on_cpu"))


@functools.cache
def library() -> Path:
    """The executor as a shared library, built where it is older than a source.

    Raises:
        RuntimeError: there is no C++ compiler, or the build failed; with the compiler's words.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise RuntimeError("the executor of PTX needs a C++ compiler: set CXX or install g++")
    where = folder()
    where.mkdir(parents=True, exist_ok=True)
    with (where / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (where / "build.ninja").write_text(_rules(compiler))
        command = [str(Path(sys.executable).parent / "ninja"), "-C", str(where), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the executor of PTX does not build:\n{done.stdout}{done.stderr}")
    return where / "libgpu_on_cpu.so"


def _rules(compiler: str) -> str:
    names = sorted(path.stem for path in SOURCES.glob("*.cpp"))
    objects = " ".join(f"{name}.o" for name in names)
    flags = os.environ.get("GPU_ON_CPU_FLAGS", "")
    return "\n".join(
        [
            f"cxx = {compiler}",
            f"flags = {' '.join(FLAGS)} {flags}",
            "rule compile",
            "  command = $cxx $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx -shared $in -o $out",
            *(f"build {name}.o: compile {SOURCES / name}.cpp" for name in names),
            f"build libgpu_on_cpu.so: link {objects}",
            "default libgpu_on_cpu.so",
            "",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(f"{library()}\n")

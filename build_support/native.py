"""Build the native libraries with ninja.

`python -m build_support.native` rebuilds after an edit of the C++ sources without pip; setup.py
calls the same functions. torch is located but not imported: the build needs only its headers and
libraries, and importing it takes seconds.
"""

from __future__ import annotations

import fcntl
import filecmp
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from build_support import cuda, host
from build_support.errors import BuildError

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "resformer_kernels"
CPU_LIBRARY = "libresformer_cpu.so"
MINIMUM_TORCH = (2, 10)

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *_AVX2)
_X86_64_ISAS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": (*_AVX512, "-mavx512bf16"),
    "avx512_amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
_AMX = "avx512_amx"
_AMX_OPS = ("attention",)
"""Ops with a build for AMX; any other takes that of avx512_bf16 in its place."""
_PORTABLE_ONLY: dict[str, tuple[str, ...]] = {"portable": ()}

_COMPILE_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    # GCC 12 warns of the undefined operand inside its own AVX-512 intrinsics. Clang knows only one
    # of the two warnings.
    "-Wno-unknown-warning-option",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
)


@dataclass(frozen=True)
class Toolchain:
    """The programs and the torch installation that a build uses."""

    cxx: str
    ninja: str
    torch: Path
    extra_compile_flags: str = ""
    extra_link_flags: str = ""
    nvcc: str | None = None
    """None where the CUDA library is not built."""
    cuda_architectures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unit:
    """One object file: a source, compiled with the flags of one variant."""

    source: str
    object: str
    flags: tuple[str, ...]
    label: str


def skip_reason(environ: Mapping[str, str] = os.environ) -> str | None:
    """Why the package is installed without native libraries; None where they are built.

    Raises BuildError where they are required.
    """
    reason = _without_compiler(environ)
    if reason is not None and environ.get("RESFORMER_CUDA") == "1":
        raise BuildError(f"RESFORMER_CUDA=1 asks for the CUDA library, but {reason}")
    return reason


def _without_compiler(environ: Mapping[str, str]) -> str | None:
    requested = environ.get("RESFORMER_SKIP_NATIVE", "")
    if requested not in ("", "0", "1"):
        raise BuildError(f"RESFORMER_SKIP_NATIVE must be 0 or 1, got {requested!r}")
    if requested == "1":
        return "RESFORMER_SKIP_NATIVE=1"
    if find_compiler(environ) is None:
        wanted = f"CXX={environ['CXX']}" if environ.get("CXX") else "c++, g++ or clang++"
        return f"no C++ compiler was found (looked for {wanted} on PATH; Debian package: g++)"
    return None


def find_compiler(environ: Mapping[str, str] = os.environ) -> str | None:
    """The C++ compiler's command line: $CXX if it is set, else the first one on PATH."""
    path = environ.get("PATH")
    requested = environ.get("CXX", "")
    if requested:
        return requested if shutil.which(shlex.split(requested)[0], path=path) else None
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name, path=path):
            return name
    return None


def find_toolchain(environ: Mapping[str, str] = os.environ) -> Toolchain:
    """Locate compiler, ninja and torch. Raises BuildError naming the first that is missing."""
    cxx = find_compiler(environ)
    if cxx is None:
        raise BuildError(skip_reason(environ) or "no C++ compiler was found")
    nvcc = None if cuda.skip_reason(environ) else cuda.find_nvcc(environ)
    return Toolchain(
        cxx=cxx,
        ninja=_find_ninja(environ),
        torch=_find_torch(),
        extra_compile_flags=environ.get("CXXFLAGS", ""),
        extra_link_flags=environ.get("LDFLAGS", ""),
        nvcc=nvcc,
        cuda_architectures=cuda.architectures(nvcc, environ) if nvcc else (),
    )


def _find_ninja(environ: Mapping[str, str]) -> str:
    places = [str(Path(sys.executable).parent)]
    if importlib.util.find_spec("ninja"):
        import ninja

        places.append(ninja.BIN_DIR)
    places.append(environ.get("PATH", os.defpath))
    found = shutil.which("ninja", path=os.pathsep.join(places))
    if found is None:
        raise BuildError("ninja was not found: `pip install ninja`, then build again")
    return found


def _find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError(
            "torch is not installed in the environment that builds. Install it first (for a CPU,"
            " the CPU build: it is a tenth of the size), or build in isolation (`pip install .`),"
            " where pip installs one for the build alone. RESFORMER_SKIP_NATIVE=1 installs the"
            " pure PyTorch reference alone."
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
        needed = ".".join(str(part) for part in MINIMUM_TORCH)
        raise BuildError(f"torch >= {needed} is needed to build, found {version}")
    return Path(spec.origin).parent


def isas(machine: str) -> dict[str, tuple[str, ...]]:
    """The instruction sets to build on `machine`, lowest first, with their compiler flags."""
    return _X86_64_ISAS if machine.lower() in ("x86_64", "amd64") else _PORTABLE_ONLY


def cpu_units(root: Path, machine: str) -> list[Unit]:
    """Every object of the CPU library, in link order.

    Where several objects define an inline function, the linker keeps the first definition. Objects
    are therefore ordered from the lowest instruction set to the highest, so that a definition
    compiled for AVX-512 never runs on a processor without it.
    """
    variants = isas(machine)
    have = tuple(f"-DRESFORMER_HAVE_{name.upper()}=1" for name in variants)
    baseline = sorted((root / "csrc").glob("*/*_cpu.cpp"))
    per_isa = sorted((root / "csrc").glob("*/*_cpu_isa.cpp"))
    if not baseline:
        raise BuildError(f"no csrc/*/*_cpu.cpp under {root}: the C++ sources are not there")
    units = [_unit(root, source, "", have) for source in baseline]
    for name, isa_flags in variants.items():
        flags = (f"-DRESFORMER_ISA={name}", f"-DRESFORMER_ISA_{name.upper()}=1", *isa_flags)
        sources = per_isa
        if name == _AMX:
            flags = ("-DRESFORMER_ISA_AVX512_BF16=1", *flags)
            sources = [source for source in per_isa if source.parent.name in _AMX_OPS]
        units += [_unit(root, source, name, flags) for source in sources]
    return units


def cuda_units(root: Path) -> list[Unit]:
    """Every object of the CUDA library."""
    sources = sorted((root / "csrc").glob("*/*_cuda.cu"))
    if not sources:
        raise BuildError(f"no csrc/*/*_cuda.cu under {root}: the CUDA sources are not there")
    return [_unit(root, source, "", ()) for source in sources]


def _unit(root: Path, source: Path, variant: str, flags: tuple[str, ...]) -> Unit:
    relative = source.relative_to(root)
    suffix = f".{variant}.o" if variant else ".o"
    label = f"[{variant}]" if variant else ""
    return Unit(relative.as_posix(), relative.with_suffix(suffix).as_posix(), flags, label)


def cpu_flags(toolchain: Toolchain) -> tuple[list[str], list[str]]:
    """Flags that compile every object of the CPU library, and those that link it."""
    library_dir = toolchain.torch / "lib"
    # System includes silence torch's warnings, and -MD still tracks its headers.
    flags = [*_COMPILE_FLAGS, "-Icsrc", "-isystem", str(toolchain.torch / "include")]
    return flags, [
        *("-Wl,--as-needed", "-Wl,-z,defs", f"-L{library_dir}", f"-Wl,-rpath-link,{library_dir}"),
        *("-ltorch_cpu", "-ltorch", "-lc10"),
    ]


def ninja_file(units: list[Unit], toolchain: Toolchain, output_dir: str) -> str:
    """The text of build.ninja for the CPU library; paths are relative to the repository's root."""
    extra = (toolchain.extra_compile_flags, toolchain.extra_link_flags)
    head = f"builddir = {_escape(output_dir)}\ncxx = {toolchain.cxx}\n"
    library = f"{output_dir}/{CPU_LIBRARY}"
    return head + _library(units, library, "", "cxx", cpu_flags(toolchain), extra)


def cuda_ninja_lines(units: list[Unit], toolchain: Toolchain, output_dir: str) -> str:
    """The part of build.ninja that builds the CUDA library."""
    architectures, cxx, torch = toolchain.cuda_architectures, toolchain.cxx, toolchain.torch
    flags = cuda.compile_flags(architectures, cxx, torch), cuda.link_flags(cxx, torch)
    head = f"nvcc = {_escape(toolchain.nvcc or '')}\n"
    return head + _library(units, f"{output_dir}/{cuda.LIBRARY}", "cuda", "nvcc", flags)


def host_units(root: Path) -> list[Unit]:
    """Every object of the host module."""
    sources = host.sources(root)
    if not sources:
        raise BuildError(f"no csrc/host/*.cpp under {root}: the sources are not there")
    return [_unit(root, source, "", ()) for source in sources]


def host_ninja_lines(units: list[Unit], toolchain: Toolchain, output_dir: str) -> str:
    """The part of build.ninja that builds the host module."""
    flags, library = (host.compile_flags(), host.LINK_FLAGS), f"{output_dir}/{host.LIBRARY}"
    extra = (toolchain.extra_compile_flags, toolchain.extra_link_flags)
    return _library(units, library, "host", "cxx", flags, extra)


def _library(
    units: list[Unit],
    library: str,
    kind: str,
    compiler: str,
    flags: tuple[Sequence[str], Sequence[str]],
    extra: tuple[str, str] = ("", ""),
) -> str:
    """Flags, rules and targets of one library.

    `kind` names its rules and variables, `compiler` the variable of its compiler. `flags` and
    `extra` are those of compiling and of linking.
    """
    suffix, prefix = (f"_{kind}", f"{kind}_") if kind else ("", "")
    variant = "" if kind else " $variant"
    compile_flags, link_flags = (
        f"{_command(own)} {users}".rstrip() for own, users in zip(flags, extra, strict=True)
    )
    text = f"""\
{prefix}flags = {compile_flags}
{prefix}link_flags = {link_flags}
rule compile{suffix}
  command = ${compiler} ${prefix}flags{variant} -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in $label
rule link{suffix}
  command = ${compiler} -shared -o $out $in ${prefix}link_flags
  description = link $out
"""
    objects = []
    for unit in units:
        objects.append(_escape(f"{Path(library).parent.as_posix()}/{unit.object}"))
        text += f"build {objects[-1]}: compile{suffix} {_escape(unit.source)}\n"
        text += f"  variant = {_command(unit.flags)}\n  label = {unit.label}\n"
    return text + f"build {_escape(library)}: link{suffix} {' '.join(objects)}\n"


def _command(arguments: Sequence[str]) -> str:
    return " ".join(shlex.quote(argument).replace("$", "$$") for argument in arguments)


def _escape(path: str) -> str:
    return path.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def build(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> list[Path]:
    """Bring the libraries up to date and return their paths: the CPU library first, then the host
    module and the CUDA library where they are built. Raises BuildError."""
    toolchain = find_toolchain(environ)
    machine = platform.machine()
    output_dir = f"build/native-{machine}"
    libraries = [CPU_LIBRARY]
    text = ninja_file(cpu_units(root, machine), toolchain, output_dir)
    if host.skip_reason() is None:
        libraries.append(host.LIBRARY)
        text += host_ninja_lines(host_units(root), toolchain, output_dir)
    if toolchain.nvcc is not None:
        libraries.append(cuda.LIBRARY)
        text += cuda_ninja_lines(cuda_units(root), toolchain, output_dir)
    ninja_path = root / output_dir / "build.ninja"
    ninja_path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(ninja_path.with_name("lock")):
        ninja_path.write_text(text)
        command = [toolchain.ninja, "-f", str(ninja_path.relative_to(root)), *_jobs(environ)]
        result = subprocess.run(command, cwd=root, env=dict(environ), check=False)
    if result.returncode != 0:
        raise BuildError(
            "compiling the native library failed (see the compiler's messages above)."
            " RESFORMER_CUDA=0 builds the CPU's alone, and RESFORMER_SKIP_NATIVE=1 installs the"
            " pure PyTorch reference alone."
        )
    return [root / output_dir / name for name in libraries]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _jobs(environ: Mapping[str, str]) -> list[str]:
    requested = environ.get("MAX_JOBS", "")
    if requested and not (requested.isdigit() and int(requested) > 0):
        raise BuildError(f"MAX_JOBS must be a positive integer, got {requested!r}")
    return ["-j", requested] if requested else []


def install(library: Path, target: Path) -> None:
    """Copy `library` to `target` atomically: a running process may have mapped the old file."""
    if target.exists() and filecmp.cmp(library, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(library, temporary)
    temporary.replace(target)


def main() -> int:
    """Build the libraries and install them into the package of the source tree."""
    try:
        reason = skip_reason()
        if reason is not None:
            print(f"not building the native library: {reason}", file=sys.stderr)
            return 0
        optional = {
            cuda.LIBRARY: ("CUDA library", cuda.skip_reason()),
            host.LIBRARY: ("host module", host.skip_reason()),
        }
        for file, (name, without) in optional.items():
            if without is not None:
                print(f"not building the {name}: {without}", file=sys.stderr)
                # A library left by an older build would still be loaded.
                (ROOT / PACKAGE / file).unlink(missing_ok=True)
        for library in build():
            install(library, ROOT / PACKAGE / library.name)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

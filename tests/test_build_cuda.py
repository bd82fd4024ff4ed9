"""The build of the CUDA library: when it is built, for which GPUs, and where it loads."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from build_support import cuda, native
from build_support.errors import BuildError
from tests.test_build import copy_tree, readelf, run_backend

ARCHITECTURES = {"sm_80", "sm_90a", "sm_100"}


needs_nvcc = pytest.mark.skipif(cuda.find_nvcc() is None, reason="nvcc is not here")


@pytest.fixture
def library() -> Path:
    """The CUDA library of this installation."""
    reason = native.skip_reason() or cuda.skip_reason()
    if reason is not None:
        pytest.skip(f"built without the CUDA library: {reason}")
    return native.ROOT / native.PACKAGE / cuda.LIBRARY


def machine_code(library: Path) -> set[str]:
    """The architectures that a library has code for, according to cuobjdump."""
    program = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if program is None and triton is not None and triton.origin is not None:
        program = shutil.which(
            "cuobjdump", path=Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        )
    if program is None:
        pytest.skip("cuobjdump is neither on PATH nor in Triton")
    done = subprocess.run([program, str(library)], capture_output=True, text=True, check=True)
    return set(re.findall(r"^arch = (\w+)$", done.stdout, re.MULTILINE))


def fake_nvcc(folder: Path) -> dict[str, str]:
    """An environment whose nvcc knows two architectures."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "nvcc"
    program.write_text("#!/bin/sh\necho sm_80\necho sm_90\n")
    program.chmod(0o755)
    return {"CUDA_HOME": str(folder)}


def test_library_holds_code_for_every_architecture(library: Path) -> None:
    requested = os.environ.get("RESFORMER_CUDA_ARCHS")
    if requested:
        pytest.skip(f"built for RESFORMER_CUDA_ARCHS={requested}")
    assert machine_code(library) == ARCHITECTURES


def test_library_needs_no_cuda_of_torch(library: Path) -> None:
    needed = [line for line in readelf("--dynamic", library).splitlines() if "NEEDED" in line]
    # In a CUDA build of torch, libtorch brings libtorch_cuda.
    assert any("[libtorch.so]" in line for line in needed)
    assert not [line for line in needed if "cuda" in line or "python" in line]
    dynamic = readelf("--dynamic", library)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_library_shows_and_uses_no_other_symbols(library: Path) -> None:
    rows = [line.split() for line in readelf("--dyn-syms", library).splitlines()[3:]]
    names = {row[-1].partition("@")[0]: row[-2] for row in rows if len(row) > 7}
    undefined = {name for name, section in names.items() if section == "UND"}
    assert not [name for name in undefined if name.startswith(("cuda", "cu", "Py", "_ZN2at"))]
    # The static CUDA runtime is hidden, since other libraries can have their own.
    assert not [name for name in set(names) - undefined if name.startswith(("cuda", "__cuda"))]


@needs_nvcc
@pytest.mark.slow
def test_wheel_with_cuda_holds_every_architecture_and_imports_without_a_gpu(
    tmp_path: Path,
) -> None:
    root = copy_tree(tmp_path / "tree")
    for folder in ("common", "mix"):
        (root / "csrc" / folder).mkdir()
        for source in sorted((native.ROOT / "csrc" / folder).iterdir()):
            if source.suffix == ".h" or source.name.endswith("_cuda.cu"):
                shutil.copy(source, root / "csrc" / folder)
    wheel, _ = run_backend(root, "build_wheel", RESFORMER_CUDA="1", RESFORMER_CUDA_ARCHS="")
    assert "-linux_" in wheel.name
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert machine_code(installed / native.PACKAGE / cuda.LIBRARY) == ARCHITECTURES
    program = (
        "import resformer_kernels, torch\n"
        "from resformer_kernels._core import extension\n"
        f"assert resformer_kernels.__file__.startswith({str(installed)!r})\n"
        "reason = extension.cuda_unavailable_reason(torch.device('cuda', 0))\n"
        "assert reason is None or 'no CUDA device' in reason, reason\n"
        "print(torch.ops.resformer.cuda_architectures())\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(installed), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", "-c", program]
    command = command if sys.version_info >= (3, 11) else [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*cuda.ARCHITECTURES, "10.0+PTX"]


def test_wheel_without_cuda_holds_none(tmp_path: Path) -> None:
    root = copy_tree(tmp_path / "tree")
    (root / native.PACKAGE / cuda.LIBRARY).write_bytes(b"left over from an older build")
    wheel, _ = run_backend(root, "build_wheel", RESFORMER_CUDA="0")
    libraries = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert f"{native.PACKAGE}/{native.CPU_LIBRARY}" in libraries
    assert f"{native.PACKAGE}/{cuda.LIBRARY}" not in libraries


def test_cuda_is_built_where_nvcc_is(tmp_path: Path) -> None:
    missing = {"CUDA_HOME": str(tmp_path)}
    assert "nvcc was not found" in str(cuda.skip_reason(missing))
    with pytest.raises(BuildError, match="RESFORMER_CUDA=1 asks for the CUDA library, but nvcc"):
        cuda.skip_reason({**missing, "RESFORMER_CUDA": "1"})
    found = fake_nvcc(tmp_path)
    assert cuda.skip_reason(found) is None
    assert cuda.skip_reason({**found, "RESFORMER_CUDA": "0"}) == "RESFORMER_CUDA=0"


def test_cuda_takes_zero_or_one() -> None:
    with pytest.raises(BuildError, match="RESFORMER_CUDA must be 0 or 1, got 'yes'"):
        cuda.skip_reason({"RESFORMER_CUDA": "yes"})


def test_cuda_without_native_contradicts_itself() -> None:
    with pytest.raises(BuildError, match=r"RESFORMER_CUDA=1 .* but RESFORMER_SKIP_NATIVE=1"):
        native.skip_reason({"RESFORMER_CUDA": "1", "RESFORMER_SKIP_NATIVE": "1"})


def test_architectures_are_those_that_nvcc_knows(tmp_path: Path) -> None:
    environ = fake_nvcc(tmp_path)
    nvcc = str(cuda.find_nvcc(environ))
    assert cuda.architectures(nvcc, environ) == ("8.0", "9.0a")

    def asked(text: str) -> tuple[str, ...]:
        return cuda.architectures(nvcc, {**environ, "RESFORMER_CUDA_ARCHS": text})

    assert asked("9.0") == ("9.0",)
    assert asked(" 8.0;9.0a, 8.0 ") == ("8.0", "9.0a")
    with pytest.raises(BuildError, match=r"names 10\.0, which .* does not know; it knows sm_80"):
        asked("10.0")
    with pytest.raises(BuildError, match=r"must be a list of architectures such as 8\.0"):
        asked("sm_90")


def test_nvcc_is_called_once_for_every_architecture(tmp_path: Path) -> None:
    flags = cuda.compile_flags(("8.0", "9.0a"), "g++", tmp_path)
    targets = [flag for flag in flags if flag.startswith("-gencode")]
    assert targets == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    # A driver takes the PTX of a variant for no other GPU.
    assert cuda.holds(("9.0a",)) == ("9.0a",)
    assert cuda.holds(("12.0", "9.0a", "8.0")) == ("12.0", "9.0a", "8.0", "12.0+PTX")
    assert "-ccbin=g++" in flags
    assert not cuda.host_compiler("ccache g++")


def test_missing_cuda_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no csrc/\*/\*_cuda.cu"):
        native.cuda_units(tmp_path)

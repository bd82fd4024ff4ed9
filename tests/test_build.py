"""The build: its libraries, what it rebuilds, and what it installs without a compiler."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from build_support import backend, host, native
from build_support.errors import BuildError

SOURCE = '#include "tiny/tiny.h"\nextern "C" int tiny_baseline() { return tiny; }\n'
ISA_SOURCE = """\
#include "tiny/tiny.h"
namespace RESFORMER_ISA {
#if defined(RESFORMER_ISA_AVX512) && !defined(__AVX512F__)
#error "AVX-512 without its flags"
#endif
[[gnu::visibility("default")]] int tiny_isa() { return tiny; }
}
"""
HOST_SOURCE = """\
#include <Python.h>
static PyModuleDef tiny = {PyModuleDef_HEAD_INIT, "_host", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__host(void) { return PyModule_Create(&tiny); }
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all files that packaging reads, with C++ sources that compile quickly."""
    monkeypatch.setenv("RESFORMER_CUDA", "0")
    return copy_tree(tmp_path / "tree")


def copy_tree(root: Path) -> Path:
    shutil.copytree(
        native.ROOT / native.PACKAGE,
        root / native.PACKAGE,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    shutil.copytree(native.ROOT / "build_support", root / "build_support")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(native.ROOT / name, root / name)
    folder = root / "csrc" / "tiny"
    folder.mkdir(parents=True)
    (folder / "tiny.h").write_text("constexpr int tiny = 1;\n")
    (folder / "tiny_cpu.cpp").write_text(SOURCE)
    (folder / "tiny_cpu_isa.cpp").write_text(ISA_SOURCE)
    (root / "csrc" / "host").mkdir()
    (root / "csrc" / "host" / "module.cpp").write_text(HOST_SOURCE)
    return root


def run(root: Path, code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in the tree."""
    environ = {**os.environ, **environ}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=root, env=environ, capture_output=True, text=True, check=False
    )


def run_backend(root: Path, hook: str, **environ: str) -> tuple[Path, str]:
    """Call a PEP 517 hook of the tree as pip does; return the artefact and the output."""
    result = run(root, f"from build_support import backend; backend.{hook}('dist')", **environ)
    printed = result.stdout + result.stderr
    assert result.returncode == 0, printed
    (artefact,) = (root / "dist").iterdir()
    return artefact, printed


@pytest.fixture
def library() -> Path:
    """The library of this installation."""
    if native.skip_reason() is not None:
        pytest.skip(f"built without the native library: {native.skip_reason()}")
    return native.ROOT / native.PACKAGE / native.CPU_LIBRARY


def readelf(option: str, library: Path) -> str:
    program = shutil.which("readelf")
    if program is None:
        pytest.skip("readelf (Debian package binutils) is not here")
    command = [program, "--wide", option, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(library: Path) -> list[str]:
    return [line.split()[-1] for line in readelf("--dyn-syms", library).splitlines() if line]


def test_library_is_built(library: Path) -> None:
    assert library.is_file()


def test_library_needs_no_python(library: Path) -> None:
    needed = [line for line in readelf("--dynamic", library).splitlines() if "NEEDED" in line]
    assert any("libtorch_cpu.so" in line for line in needed)
    assert not any("python" in line or "gomp" in line for line in needed)
    assert not [name for name in symbols(library) if name.startswith(("Py", "_Py"))]


def test_library_carries_no_path_of_the_machine_that_built_it(library: Path) -> None:
    dynamic = readelf("--dynamic", library)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_library_uses_only_the_stable_interface_of_torch(library: Path) -> None:
    # Mangled names of at:: and c10:: functions, which change between versions of torch.
    unstable = ("_ZN2at", "_ZN3c10", "_ZNK2at")
    assert not [name for name in symbols(library) if name.startswith(unstable)]


def test_second_build_does_nothing_and_an_edited_header_rebuilds(tree: Path) -> None:
    built, module = native.build(tree)
    assert module.name == host.LIBRARY
    before = built.stat().st_mtime_ns
    native.build(tree)
    assert built.stat().st_mtime_ns == before
    (tree / "csrc/tiny/tiny.h").write_text("constexpr int tiny = 2;\n")
    native.build(tree)
    assert built.stat().st_mtime_ns > before


def test_every_instruction_set_is_compiled_with_its_flags(tree: Path) -> None:
    units = native.cpu_units(tree, "x86_64")
    assert [unit.label for unit in units] == [
        *("", "[portable]", "[avx2]", "[avx512]", "[avx512_bf16]"),
    ]
    assert "-DRESFORMER_HAVE_AVX512_BF16=1" in units[0].flags
    assert units[1].flags == ("-DRESFORMER_ISA=portable", "-DRESFORMER_ISA_PORTABLE=1")
    assert "-mavx512bf16" in units[-1].flags
    amx = [x for x in native.cpu_units(native.ROOT, "x86_64") if x.label == "[avx512_amx]"]
    assert [unit.source for unit in amx] == ["csrc/attention/attention_cpu_isa.cpp"]
    assert {"-mamx-tile", "-mamx-bf16", "-DRESFORMER_ISA_AVX512_BF16=1"} <= set(amx[0].flags)
    assert [unit.label for unit in native.cpu_units(tree, "aarch64")] == ["", "[portable]"]


def test_install_leaves_an_equal_library_alone(tmp_path: Path) -> None:
    built, target = tmp_path / "built.so", tmp_path / "package" / "built.so"
    built.write_bytes(b"one")
    native.install(built, target)
    before = target.stat().st_ino
    native.install(built, target)
    assert target.stat().st_ino == before
    built.write_bytes(b"two")
    native.install(built, target)
    assert target.read_bytes() == b"two"
    assert [path.name for path in target.parent.iterdir()] == ["built.so"]


def test_wheel_holds_the_libraries_and_is_tagged_for_this_python(tree: Path) -> None:
    wheel, _ = run_backend(tree, "build_wheel")
    version = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{version}-{version}-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert f"{native.PACKAGE}/{native.CPU_LIBRARY}" in names
    assert f"{native.PACKAGE}/{host.LIBRARY}" in names
    assert f"{native.PACKAGE}/py.typed" in names
    assert f"{native.PACKAGE}/_host.pyi" in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "build_support/"))]


def test_wheel_without_the_host_module_serves_any_python_and_warns_once(tree: Path) -> None:
    build = tree / "build_support" / "host.py"
    build.write_text(build.read_text().replace('find_spec("pybind11")', 'find_spec("no_pybind11")'))
    (tree / native.PACKAGE / host.LIBRARY).write_bytes(b"left over from an older build")
    wheel, printed = run_backend(tree, "build_wheel")
    assert "-py3-none-linux_" in wheel.name
    names = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert names == [f"{native.PACKAGE}/{native.CPU_LIBRARY}"]
    assert printed.count("WITHOUT paged caches: pybind11 is not installed") == 1


def test_host_module_needs_python_alone(library: Path) -> None:
    reason = host.skip_reason()
    if reason is not None:
        pytest.skip(f"built without the host module: {reason}")
    module = library.with_name(host.LIBRARY)
    dynamic = readelf("--dynamic", module).splitlines()
    needed = [line for line in dynamic if "NEEDED" in line]
    assert not [line for line in needed if "torch" in line or "c10" in line]
    assert not [line for line in dynamic if "RPATH" in line or "RUNPATH" in line]


def test_wheel_without_native_is_pure_and_warns_once(tree: Path) -> None:
    (tree / native.PACKAGE / native.CPU_LIBRARY).write_bytes(b"left over from an older build")
    wheel, printed = run_backend(tree, "build_wheel", RESFORMER_SKIP_NATIVE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    assert printed.count("WITHOUT its native kernels: RESFORMER_SKIP_NATIVE=1") == 1


def test_sdist_holds_the_sources_and_no_binary(tree: Path) -> None:
    for built in native.build(tree):
        native.install(built, tree / native.PACKAGE / built.name)
    sdist, _ = run_backend(tree, "build_sdist")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert "csrc/tiny/tiny_cpu_isa.cpp" in names
    assert "build_support/native.py" in names
    assert not [name for name in names if name.endswith((".so", ".o"))]


def test_no_compiler_is_a_reason_to_skip(tmp_path: Path) -> None:
    assert "no C++ compiler was found" in str(native.skip_reason({"PATH": str(tmp_path)}))
    named = native.skip_reason({"PATH": str(tmp_path), "CXX": "nothing++ -m64"})
    assert "CXX=nothing++ -m64" in str(named)


def test_wheel_without_a_compiler_is_pure_and_warns_once(tree: Path) -> None:
    wheel, printed = run_backend(tree, "build_wheel", CXX="nothing++")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert printed.count("WITHOUT its native kernels: no C++ compiler was found") == 1


@pytest.mark.parametrize("value", ["yes", "2"])
def test_skip_native_takes_zero_or_one(value: str) -> None:
    with pytest.raises(BuildError, match="RESFORMER_SKIP_NATIVE must be 0 or 1, got"):
        native.skip_reason({"RESFORMER_SKIP_NATIVE": value})


def test_a_compile_error_is_reported(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tree / "csrc/tiny/tiny_cpu.cpp").write_text("this is not C++\n")
    with pytest.raises(BuildError, match="compiling the native library failed"):
        native.build(tree)
    assert "tiny_cpu.cpp" in capfd.readouterr().out


def test_missing_torch_is_named(tree: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from build_support import native; native.build()"
    )
    result = run(tree, code)
    assert result.returncode != 0
    assert "torch is not installed in the environment that builds" in result.stderr


def test_a_wheel_in_isolation_asks_for_the_pinned_torch(tree: Path) -> None:
    code = """
import sys
sys.modules["torch"] = None
from build_support import backend
wheel, editable = backend.get_requires_for_build_wheel(), backend.get_requires_for_build_editable()
print([wheel, editable, backend.get_requires_for_build_sdist()])
"""
    result = run(tree, code)
    torch = f"torch=={backend.TORCH}"
    assert result.stdout.splitlines()[-1] == str([[torch], [torch], []])


def test_torch_is_asked_for_where_it_is_needed_and_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backend.torch_requirement() == []
    monkeypatch.setitem(sys.modules, "torch", None)
    assert backend.torch_requirement() == [f"torch=={backend.TORCH}"]
    other = {**os.environ, "TORCH_VERSION": "2.12.1+cpu"}
    assert backend.torch_requirement(other) == ["torch==2.12.1+cpu"]
    assert backend.torch_requirement({**os.environ, "RESFORMER_SKIP_NATIVE": "1"}) == []
    assert backend.torch_requirement({"PATH": str(tmp_path)}) == []


def test_no_source_reads_the_headers_of_openmp(library: Path) -> None:
    objects = native.ROOT / f"build/native-{platform.machine()}/build.ninja"
    if not objects.exists():
        pytest.skip(f"{library.name} was not built in this checkout")
    command = [native.find_toolchain().ninja, "-f", str(objects), "-t", "deps"]
    read = subprocess.run(
        command, cwd=native.ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert "torch/csrc/stable/tensor.h" in read
    assert "/omp.h" not in read


def test_missing_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no csrc/\*/\*_cpu.cpp"):
        native.build(tmp_path)
    with pytest.raises(BuildError, match=r"no csrc/host/\*.cpp"):
        native.host_units(tmp_path)


def test_max_jobs_must_be_positive(tree: Path) -> None:
    with pytest.raises(BuildError, match="MAX_JOBS must be a positive integer, got '0'"):
        native.build(tree, {**os.environ, "MAX_JOBS": "0"})

"""AMX's kernels: tiles beside a model of Intel's manual in NumPy, attention against float64.

A processor without AMX runs the very instructions that ship: a handler of SIGILL does what the
manual says (amx/trap.cpp). One with AMX runs them itself, and both find the bits of one model.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import pytest

from build_support.native import ROOT
from resformer_kernels._core import extension
from tests.attention.amx import libraries

CHECKS = "tests/attention/amx/checks.py"


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> libraries.Libraries:
    """The libraries, made once for all workers of this run."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        pytest.skip("AMX is used on x86-64 under Linux alone")
    if extension.unavailable_reason() is not None:
        pytest.skip(str(extension.unavailable_reason()))
    if "avx512_bf16" not in extension.available_cpu_paths():
        pytest.skip("the kernels around the tiles need AVX-512-BF16, which this machine lacks")
    if not libraries.OBJECTS.exists():
        pytest.skip(f"needs the objects of a build in this tree, {libraries.OBJECTS}")
    base = tmp_path_factory.getbasetemp()
    return libraries.build((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "amx")


def run(arguments: list[str], **environ: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    printed = result.stdout + result.stderr
    assert result.returncode == 0, printed
    return printed


def has_amx() -> bool:
    return "avx512_amx" in extension.available_cpu_paths()


@pytest.fixture
def own(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with AMX, and a system that lets this process use it."""
    assert native
    monkeypatch.setenv("RESFORMER_CPU", "avx512_amx")
    try:
        assert extension.cpu_path() == "avx512_amx"
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.fixture
def emulated(built: libraries.Libraries) -> libraries.Libraries:
    """The libraries, on a processor that traps what it does not know."""
    if has_amx():
        pytest.skip("this processor has AMX, and runs its instructions itself")
    return built


def test_attention_on_emulated_tiles_stays_within_budget(emulated: libraries.Libraries) -> None:
    child = ["tests.attention.amx.child", str(emulated.kernels), str(emulated.trap)]
    printed = run([*child, CHECKS, "-q"], RESFORMER_CPU="avx512_amx")
    assert int(printed.rpartition("emulated instructions: ")[2]) > 0


@pytest.mark.usefixtures("own")
def test_attention_on_the_processors_tiles_stays_within_budget() -> None:
    child = ["tests.attention.amx.child", str(extension.LIBRARY), "-"]
    assert "passed" in run([*child, CHECKS, "-q"], RESFORMER_CPU="avx512_amx")


def products(built: libraries.Libraries, how: str) -> list[str]:
    return ["tests.attention.amx.model", str(built.products), str(built.trap), how]


def test_emulated_products_find_the_bits_of_the_manual(emulated: libraries.Libraries) -> None:
    assert "products agree" in run(products(emulated, "emulated"))


@pytest.mark.usefixtures("own")
def test_the_processors_products_find_the_bits_of_the_manual(built: libraries.Libraries) -> None:
    assert "products agree" in run(products(built, "own"))


def test_a_tile_without_a_configuration_ends_the_process(emulated: libraries.Libraries) -> None:
    command = [sys.executable, "-m", *products(emulated, "without a session")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 97
    assert "a thread that has configured none" in result.stderr


def test_the_library_that_ships_has_the_instructions_and_no_emulation() -> None:
    if extension.unavailable_reason() is not None or platform.machine() != "x86_64":
        pytest.skip("needs the native library for x86-64")
    if (program := shutil.which("objdump")) is None:
        pytest.skip("objdump (Debian package binutils) is not here")
    command = [program, "-d", "--no-show-raw-insn", str(extension.LIBRARY)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("ldtilecfg", "tilerelease", "tileloadd", "tilestored", "tdpbf16ps"):
        assert f"\t{name}" in code, name
    assert b"emulated AMX" not in extension.LIBRARY.read_bytes()


def test_the_path_is_never_taken_unasked(native: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native
    monkeypatch.delenv("RESFORMER_CPU", raising=False)
    assert extension.cpu_path() != "avx512_amx"


def test_a_machine_without_amx_says_what_it_lacks(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert native
    if has_amx():
        pytest.skip("this machine has AMX")
    monkeypatch.setenv("RESFORMER_CPU", "avx512_amx")
    lacks = "AMX|go up to (portable|avx2|avx512)\\b|has no amx-tile|XCR0"
    with pytest.raises(RuntimeError, match=rf"RESFORMER_CPU=avx512_amx cannot run here.*({lacks})"):
        extension.cpu_path()

"""scripts/preflight.sh names the Debian packages that set-up lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "preflight.sh"


def preflight(python: str, path: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name != "CXX"}
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), python],
        env={**environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def stub(path: Path, body: str) -> str:
    path.write_text(f'#!/bin/sh\ncase "$*" in\n{body}\nesac\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def with_compiler(tmp_path: Path) -> str:
    """A PATH that holds a g++ and nothing else."""
    stub(tmp_path / "g++", "*) ;;")
    return str(tmp_path)


def test_a_complete_machine_passes() -> None:
    if not shutil.which("g++"):
        pytest.skip("g++ is not here")
    result = preflight(sys.executable, os.environ["PATH"])
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_everything_missing_is_named_in_one_line(tmp_path: Path) -> None:
    result = preflight("python3", str(tmp_path))
    assert result.returncode == 1
    assert "sudo apt install python3 python3-venv python3-dev g++" in result.stderr


def test_an_old_python_is_named_with_its_version(tmp_path: Path, with_compiler: str) -> None:
    python = stub(tmp_path / "old", "*version_info*) exit 1 ;;\n-V) echo Python 3.9.2 ;;")
    result = preflight(python, with_compiler)
    assert result.returncode == 1
    assert "Python 3.9.2" in result.stderr
    assert "make PYTHON=" in result.stderr


def test_missing_venv_and_headers_are_named(tmp_path: Path, with_compiler: str) -> None:
    python = stub(tmp_path / "bare", "*ensurepip*) exit 1 ;;\n*sysconfig*) echo /nowhere ;;")
    result = preflight(python, with_compiler)
    assert result.returncode == 1
    assert "/nowhere/Python.h" in result.stderr
    assert "sudo apt install python3-venv python3-dev\n" in result.stderr

"""Facts that are written in two places, held to one."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import resformer_kernels
from build_support import backend

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path
    for folder in ("resformer_kernels", "build_support", "tests", "csrc", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
)


def test_version_stands_in_one_place() -> None:
    assert importlib.metadata.version("resformer-kernels") == resformer_kernels.__version__
    quoted = f'"{resformer_kernels.__version__}"'
    written = [path for path in (*SOURCES, ROOT / "pyproject.toml") if quoted in path.read_text()]
    assert written == [ROOT / "resformer_kernels" / "__init__.py"]


def test_set_up_build_and_readme_pin_the_same_torch() -> None:
    pinned = re.search(r"TORCH_VERSION:-([\d.]+)", (ROOT / "scripts/venv.sh").read_text())
    assert pinned is not None
    assert pinned[1] == backend.TORCH
    assert f"torch {pinned[1]}" in (ROOT / "README.md").read_text()


def test_files_are_short_enough_to_read() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length >= 400} == {}

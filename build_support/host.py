"""The host module: the only library tied to a Python version (pybind11 has no limited API)."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path

SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))
"""Such as .cpython-311-x86_64-linux-gnu.so: each Python loads its own."""
LIBRARY = f"_host{SUFFIX}"

COMPILE_FLAGS = ("-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# Python's symbols stay undefined; the interpreter provides them.
LINK_FLAGS = ("-Wl,--as-needed", "-Wl,--exclude-libs,ALL")


def skip_reason() -> str | None:
    """Why the host module is not built; None where it is."""
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed in the environment that builds (`pip install pybind11`)"
    header = _python_include() / "Python.h"
    if not header.exists():
        return f"Python's headers are not here ({header}; Debian package: python3-dev)"
    return None


def sources(root: Path) -> list[Path]:
    """Every source of the module."""
    return sorted((root / "csrc" / "host").glob("*.cpp"))


def compile_flags() -> list[str]:
    """The compiler's flags, without the user's CXXFLAGS."""
    import pybind11

    includes = (Path(pybind11.get_include()), _python_include())
    system = [flag for path in includes for flag in ("-isystem", str(path))]
    return [*COMPILE_FLAGS, "-Icsrc", *system]


def _python_include() -> Path:
    return Path(sysconfig.get_paths()["include"])

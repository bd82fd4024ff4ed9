"""The build backend: setuptools', which also asks for torch where a wheel needs its headers.

Which requirement that is depends on the environment, so pyproject.toml cannot list it. A torch that
is there is taken; in isolation it is one exact version, because "any" would be whatever came out
last. Nothing of the wheel depends on that choice: its libraries serve every torch from 2.10 on.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

from build_support import native

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH = "2.13.0"
"""What an isolated build reads the headers of, and what `make setup` installs."""

Settings = Mapping[str, str | list[str] | None] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """What building a wheel needs beside pyproject.toml's list."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_requirement()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """What an editable install needs beside pyproject.toml's list."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_requirement()]


def torch_requirement(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The torch to install before the build: none where one is here or nothing is compiled.

    TORCH_VERSION names another than the pinned one, such as "2.13.0+cpu" for the CPU build: its
    headers serve the CUDA library too.
    """
    if native.skip_reason(environ) is not None or importlib.util.find_spec("torch") is not None:
        return []
    return [f"torch=={environ.get('TORCH_VERSION') or TORCH}"]

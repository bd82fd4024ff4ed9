"""The build backend: setuptools', plus torch as a requirement where a wheel needs its headers.

The requirement depends on the environment, so pyproject.toml cannot list it. An installed torch is
used. An isolated build asks for one exact version, so that builds do not change with torch's
releases. The wheel does not depend on that choice: its libraries work with every torch >= 2.10.
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
"""The version whose headers an isolated build uses, and which `make setup` installs."""

Settings = Mapping[str, str | list[str] | None] | None


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Requirements of building a wheel beyond pyproject.toml's list."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *torch_requirement()]


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Requirements of an editable install beyond pyproject.toml's list."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *torch_requirement()]


def torch_requirement(environ: Mapping[str, str] = os.environ) -> list[str]:
    """The torch to install before the build; empty where one is installed or nothing is compiled.

    TORCH_VERSION overrides the pinned version, for instance with "2.13.0+cpu" for the CPU build,
    whose headers suffice for the CUDA library too.
    """
    if native.skip_reason(environ) is not None or importlib.util.find_spec("torch") is not None:
        return []
    return [f"torch=={environ.get('TORCH_VERSION') or TORCH}"]

"""Packaging of the native libraries, which pyproject.toml cannot describe."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command import bdist_wheel, build_ext, build_py
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_support import cuda, host, native  # noqa: E402
from build_support.errors import BuildError  # noqa: E402

SKIP_REASON = native.skip_reason()
WITHOUT_CUDA = SKIP_REASON or cuda.skip_reason()
WITHOUT_HOST = SKIP_REASON or host.skip_reason()


class BuildPython(build_py.build_py):
    """Warns once if the package is installed without its kernels."""

    def run(self) -> None:
        if SKIP_REASON is not None:
            self.warn(
                f"installing resformer_kernels WITHOUT its native kernels: {SKIP_REASON}."
                " Everything works through the pure PyTorch reference, which is slow."
            )
        elif WITHOUT_HOST is not None:
            self.warn(f"installing resformer_kernels WITHOUT paged caches: {WITHOUT_HOST}")
        if SKIP_REASON is None and WITHOUT_CUDA is not None:
            self.announce(f"without CUDA kernels of C++: {WITHOUT_CUDA}", logging.INFO)
        super().run()


class BuildNative(build_ext.build_ext):
    """Builds the libraries with ninja instead of setuptools' compiler classes."""

    def get_ext_filename(self, fullname: str) -> str:
        *parents, name = fullname.split(".")
        return str(Path(*parents, FILES[name]))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            # The first call builds all libraries; for later ones ninja finds nothing to do.
            (library,) = [path for path in native.build(ROOT) if path.name == target.name]
        except BuildError as error:
            raise PlatformError(str(error)) from error
        native.install(library, target)


class BuildWheel(bdist_wheel.bdist_wheel):
    """Tags the wheel for this Python if it holds the host module, else py3-none-<platform>: the
    kernels' libraries work with every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform_tag = super().get_tag()
        return ("py3", "none", platform_tag) if WITHOUT_HOST else (python, abi, platform_tag)


def libraries() -> list[str]:
    """File names of the libraries that the package contains."""
    if SKIP_REASON is not None:
        return []
    optional = {host.LIBRARY: WITHOUT_HOST, cuda.LIBRARY: WITHOUT_CUDA}
    return [native.CPU_LIBRARY, *(name for name, without in optional.items() if not without)]


FILES = {name.partition(".")[0]: name for name in libraries()}
"""The file name of each library, by its name without suffixes."""


setup(
    ext_modules=[Extension(f"{native.PACKAGE}.{name}", sources=[]) for name in FILES],
    cmdclass={
        "bdist_wheel": BuildWheel,
        "build_ext": BuildNative,
        "build_py": BuildPython,
    },
)

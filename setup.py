"""Packaging: what pyproject.toml cannot say, which is how the native libraries are built."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command import bdist_wheel, build_ext, build_py
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_support import cuda, native  # noqa: E402
from build_support.errors import BuildError  # noqa: E402

SKIP_REASON = native.skip_reason()
WITHOUT_CUDA = SKIP_REASON or cuda.skip_reason()


class BuildPython(build_py.build_py):
    """Says, once, that the package goes without its kernels."""

    def run(self) -> None:
        if SKIP_REASON is not None:
            self.warn(
                f"installing resformer_kernels WITHOUT its native kernels: {SKIP_REASON}."
                " Everything works through the pure PyTorch reference, which is slow."
            )
        elif WITHOUT_CUDA is not None:
            self.announce(f"without CUDA kernels of C++: {WITHOUT_CUDA}", logging.INFO)
        super().run()


class BuildNative(build_ext.build_ext):
    """Builds the libraries with ninja in place of setuptools' compiler classes."""

    def get_ext_filename(self, fullname: str) -> str:
        *parents, name = fullname.split(".")
        return str(Path(*parents, f"{name}.so"))

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            # For the second library ninja finds nothing left to do.
            (library,) = [path for path in native.build(ROOT) if path.name == target.name]
        except BuildError as error:
            raise PlatformError(str(error)) from error
        native.install(library, target)


class BuildWheel(bdist_wheel.bdist_wheel):
    """Tags the wheel py3-none-<platform>: the library needs no particular Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


def libraries() -> list[str]:
    """The names of the libraries that go into the package."""
    if SKIP_REASON is not None:
        return []
    return [native.CPU_LIBRARY] if WITHOUT_CUDA else [native.CPU_LIBRARY, cuda.LIBRARY]


setup(
    ext_modules=[
        Extension(f"{native.PACKAGE}.{Path(name).stem}", sources=[]) for name in libraries()
    ],
    cmdclass={
        "bdist_wheel": BuildWheel,
        "build_ext": BuildNative,
        "build_py": BuildPython,
    },
)

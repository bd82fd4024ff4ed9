"""Packaging: what pyproject.toml cannot say, which is how the native library is built."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command import bdist_wheel, build_ext, build_py
from setuptools.errors import PlatformError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from build_support import native  # noqa: E402

SKIP_REASON = native.skip_reason()


class BuildPython(build_py.build_py):
    """Says, once, that the package goes without its kernels."""

    def run(self) -> None:
        if SKIP_REASON is not None:
            self.warn(
                f"installing resformer_kernels WITHOUT its native kernels: {SKIP_REASON}."
                " Everything works through the pure PyTorch reference, which is slow."
            )
        super().run()


class BuildNative(build_ext.build_ext):
    """Builds the library with ninja in place of setuptools' compiler classes."""

    def get_ext_filename(self, fullname: str) -> str:
        *parents, name = fullname.split(".")
        return str(Path(*parents, f"{name}.so"))

    def build_extension(self, ext: Extension) -> None:
        try:
            library = native.build(ROOT)
        except native.BuildError as error:
            raise PlatformError(str(error)) from error
        native.install(library, Path(self.get_ext_fullpath(ext.name)))


class BuildWheel(bdist_wheel.bdist_wheel):
    """Tags the wheel py3-none-<platform>: the library needs no particular Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", platform_tag


setup(
    ext_modules=[]
    if SKIP_REASON
    else [Extension(f"{native.PACKAGE}.{Path(native.CPU_LIBRARY).stem}", sources=[])],
    cmdclass={
        "bdist_wheel": BuildWheel,
        "build_ext": BuildNative,
        "build_py": BuildPython,
    },
)

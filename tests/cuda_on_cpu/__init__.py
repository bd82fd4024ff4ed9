"""CUDA sources built for the CPU: a machine without a GPU runs all of them but the hardware.

The text of a `*_cuda.cu` file is compiled by the C++ compiler, with the headers of this folder's
`common` in place of CUDA; its ops are registered for CPU tensors, under another namespace.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from build_support import native

_LAUNCH = re.compile(r"(\w+)<<<(.+?), (\w+), 0, stream>>>\(")
_REGISTERED = "STABLE_TORCH_LIBRARY_IMPL(resformer, CUDA, m)"


def build(source: str, namespace: str, folder: Path) -> Path:
    """The library of `source`, such as "mix/mix_cuda.cu"; skips where there is no compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not here")
    given = (native.ROOT / "csrc" / source).read_text()
    text, launches = _LAUNCH.subn(r"cuda_on_cpu::launch(\1, \2, \3)(", given)
    assert launches or "launch_together(" in text
    assert _REGISTERED in text
    text = text.replace(_REGISTERED, f"STABLE_TORCH_LIBRARY_IMPL({namespace}, CPU, m)")
    (folder / "source.cpp").write_text(text)
    library = folder / "library.so"
    torch_folder = Path(torch.__file__).parent
    includes = (Path(__file__).parent, native.ROOT / "csrc", torch_folder / "include")
    command = [
        *(
            compiler,
            "-std=c++20",
            "-O1",
            "-Wall",
            "-Werror",
            "-Wno-unknown-pragmas",
            "-shared",
            "-fPIC",
        ),
        *("-ffp-contract=off", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
        *(f"-isystem{path}" if path == includes[-1] else f"-I{path}" for path in includes),
        *(str(folder / "source.cpp"), "-o", str(library)),
        *(f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]
    subprocess.run(command, check=True)
    return library

"""Triton's launches without a GPU: NVIDIA's driver library is replaced by one that does nothing.

Kernels are compiled for sm_90 and launched, on CPU tensors, by Triton's own launcher; only what
would run on the GPU does not. So what a call costs on the host can be measured, and what each
kernel is given can be compared. A process that installs the double cannot use a GPU.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_suffix(".c")
CAPABILITY = (9, 0)
_SIZES = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i32": 4, "fp32": 4}
"""Bytes of a parameter; 8 where it is not listed."""
_HEAD = struct.Struct("6i")


class Given(NamedTuple):
    """A launch as the driver saw it."""

    kernel: str
    grid: tuple[int, ...]
    """Blocks, threads and bytes of shared memory."""
    pointers: tuple[int, ...]
    """Addresses, those within tensor maps too."""
    rest: tuple[bytes, ...]
    """All other parameters."""


class Double:
    """The stand-in for the driver library, built in `folder` and installed as Triton's."""

    def __init__(self, folder: Path) -> None:
        import triton
        from triton.backends.nvidia import driver

        library = folder / "libcuda.so.1"
        include = Path(driver.__file__).parent / "include"
        command = ["cc", "-shared", "-fPIC", "-O2", f"-I{include}", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", str(library), str(SOURCE)], check=True)
        # Found by its name from now on, whoever asks for it.
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self._library.double_stop.restype = ctypes.c_void_p
        triton.knobs.nvidia.libcuda_path = str(folder)
        active: Any = driver.CudaDriver()
        active.get_current_device = lambda: 0
        active.get_current_stream = lambda _device: 0
        active.get_device_capability = lambda _device: CAPABILITY
        triton.runtime.driver.set_active(active)

    def launches(self, run: Any) -> list[Given]:
        """What `run()` launches. Its kernels must have been launched before."""
        kinds: dict[int, tuple[str, list[str]]] = {}
        for compiled in _kernels():
            kinds[compiled.function] = compiled.name, _types(compiled)
            sizes = [_size(kind) for kind in kinds[compiled.function][1]]
            array = (ctypes.c_int * len(sizes))(*sizes)
            self._library.double_describe(ctypes.c_uint64(compiled.function), array, len(sizes))
        self._library.double_start()
        run()
        size = ctypes.c_size_t()
        data = ctypes.string_at(self._library.double_stop(ctypes.byref(size)) or 0, size.value)
        found = []
        while data:
            kernel, *grid = _HEAD.unpack_from(data)
            name, types = kinds[kernel]
            at, pointers, rest = _HEAD.size, [], []
            for kind in types:
                value = data[at : at + _size(kind)]
                at += len(value)
                if kind[0] == "*" or kind == "map":
                    pointers.append(int.from_bytes(value[:8], "little"))
                    value = value[8:]
                rest.append(value)
            data = data[at:]
            found.append(Given(name, tuple(grid), tuple(pointers), tuple(rest)))
        return found


def _kernels() -> list[Any]:
    from resformer_kernels._triton import launch

    return list(launch.compiled_kernels())


def _size(kind: str) -> int:
    return 128 if kind == "map" else _SIZES.get(kind, 8)


def _types(compiled: Any) -> list[str]:
    """The types of a compiled kernel's parameters."""
    found: list[str] = []

    def add(kind: Any) -> None:
        if isinstance(kind, tuple):
            for member in kind:
                add(member)
        elif kind.startswith("tensordesc"):
            rank = kind.count(",") + 1
            found.extend(["map", *["i32"] * rank, *["i64"] * rank])
        elif kind != "constexpr":
            found.append(kind)

    for kind in compiled.src.signature.values():
        add(kind)
    return found

"""What kernels are given when the executor runs a launch, and what a worker says of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from resformer_kernels._triton import available
from tests.gpu_on_cpu.executor import nothing_written, packed
from tests.gpu_on_cpu.tensor_maps import BYTES, tensor_map
from tests.gpu_on_cpu.worker import ROOT, Job, Verdict, verdicts

needs_triton = pytest.mark.skipif(
    available.version_reason() is not None, reason=str(available.version_reason())
)
_STORE = re.compile(r"^\s*(@\S+\s+)?st\.global\..*$", re.MULTILINE)
MIX = "mix: heads bfloat16"


@needs_triton
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_parameters_are_those_of_triton_s_launcher() -> None:
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "tests.gpu_on_cpu.launcher_parameters"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\d+) launches, (\d+) tensor maps", done.stdout)
    assert len(found) == 5
    assert all(int(launches) >= 1 for launches, _ in found)
    assert sum(int(maps) for _, maps in found) >= 6


def test_arguments_take_as_many_bytes_as_parameters_have() -> None:
    x = torch.zeros(4)
    assert packed(x[1:], 8) == (x.data_ptr() + 4).to_bytes(8, "little")
    assert packed(-2, 4) == b"\xfe\xff\xff\xff"
    assert packed(2**63 + 1, 8) == b"\x01" + bytes(6) + b"\x80"
    assert packed(True, 1) == b"\x01"
    assert packed(0.1, 4) == b"\xcd\xcc\xcc\x3d"
    assert packed(-0.0, 8) == bytes(7) + b"\x80"
    assert packed(b"abc", 3) == b"abc"
    with pytest.raises(ValueError, match="2 bytes for a parameter of 4"):
        packed(b"ab", 4)


def test_nothing_is_written_by_storage() -> None:
    x = torch.zeros(10, 3, dtype=torch.float16)
    ((address, marks),) = nothing_written(x[4:], x[:2]).items()
    assert address == x.data_ptr()
    assert (marks.numel(), int(marks.sum())) == (60, 0)


def test_a_tensor_map_has_its_innermost_axis_first() -> None:
    found = tensor_map(
        *(0x1000, (5, 70, 64), (70 * 128, 128, 1), (1, 32, 64)), element_bytes=2, swizzle=3
    )
    numbers = torch.frombuffer(bytearray(found), dtype=torch.int32).tolist()
    assert len(found) == BYTES
    assert numbers[2:6] == [0x1000, 0, 3, 2]
    assert numbers[6:16:2] == [64, 70, 5, 0, 0]
    assert numbers[16:24:2] == [256, 70 * 256, 0, 0]
    assert numbers[24:29] == [64, 32, 1, 0, 0]
    assert numbers[29:31] == [3, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"address": 0x1008}, "multiple of 16"),
        ({"sizes": (0, 64)}, "sizes"),
        ({"strides": (64, 2)}, "last axis of 2"),
        ({"strides": (63, 1)}, "strides"),
        ({"box": (512, 64)}, "a box"),
        ({"box": (32, 4)}, "rows of 8 bytes"),
        ({"box": (32, 128)}, "rows of 256 bytes of a box at swizzle 3"),
        ({"swizzle": 4}, "swizzle 4"),
        ({"box": (32,)}, "1 sides"),
    ],
)
def test_what_the_driver_would_refuse_makes_no_tensor_map(
    change: dict[str, object], message: str
) -> None:
    usual = {
        "address": 0x1000,
        "sizes": (70, 64),
        "strides": (64, 1),
        "box": (32, 64),
        "element_bytes": 2,
        "swizzle": 3,
    }
    assert len(tensor_map(**usual)) == BYTES  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"no tensor map: .*{message}"):
        tensor_map(**{**usual, **change})  # type: ignore[arg-type]


def without_partial_sums(ptx: str) -> str:
    """The kernel that mix's backward begins with, which stores nothing."""
    return _STORE.sub("", ptx) if ".entry backward_kernel" in ptx else ptx


def without_results(ptx: str) -> str:
    """Mix's forward, which stores nothing."""
    return _STORE.sub("", ptx) if ".entry forward_kernel" in ptx else ptx


def beyond_results(ptx: str) -> str:
    """Mix's forward, which stores far from its result."""
    if ".entry forward_kernel" not in ptx:
        return ptx
    return re.sub(r"(st\.global\S* \[ %\w+ \+) 0 \]", r"\1 1073741824 ]", ptx)


def no_ptx(ptx: str) -> str:
    """Something that nobody knows."""
    return ptx.replace("ret;", "frobnicate.b32;\nret;")


@needs_triton
def test_a_worker_tells_what_is_wrong() -> None:
    edits = ("without_partial_sums", "without_results", "beyond_results", "no_ptx")
    jobs = [Job(MIX, 80, edit=f"tests.gpu_on_cpu.test_launches:{name}") for name in edits]
    plain, *rest = verdicts([Job(MIX, 80), *jobs])
    assert (plain.kind, plain.text) == ("", "")
    assert plain.kernels == {"forward_kernel": 1, "backward_kernel": 1, "sum_kernel": 1}
    assert plain.steps > 1000
    by_edit: dict[str, Verdict] = dict(zip(edits, rest, strict=True))
    kinds = {name: found.kind for name, found in by_edit.items()}
    assert kinds == {
        "without_partial_sums": "unwritten",
        "without_results": "value",
        "beyond_results": "bounds",
        "no_ptx": "unknown",
    }
    assert "kernel sum_kernel" in by_edit["without_partial_sums"].text
    assert "partials" in by_edit["without_partial_sums"].text
    assert "forward_kernel" in by_edit["beyond_results"].text
    assert "frobnicate" in by_edit["no_ptx"].text

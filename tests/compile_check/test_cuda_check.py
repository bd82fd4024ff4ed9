"""The CUDA library as compile-check reads it."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_support import cuda, native
from resformer_kernels._triton import available
from resformer_kernels.cli.compile import cuda as _cuda_check
from tests.compile_check.test_compile_check import run

USAGE = """
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN9resformer50_GLOBAL__N__3aaefafb_11_mix_cuda_cu_9a98da62_1029410mix_kernelIfLi1EEvi:
  REG:60 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:3364 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN9resformer50_GLOBAL__N__3aaefafb_11_mix_cuda_cu_9a98da62_1029410mix_kernelIfLi4EEvi:
  REG:58 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:3364 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_80
 Function _ZN9resformer50_GLOBAL__N__3aaefafb_11_mix_cuda_cu_9a98da62_1029410sum_kernelEv:
  REG:22 STACK:0 SHARED:2048 LOCAL:0 CONSTANT[0]:3364 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_instances_are_taken_together() -> None:
    summed, mixed = _cuda_check.read(USAGE, ["mix"], [80, 90])
    assert (summed.op, summed.capability, summed.ok) == ("mix", 80, True)
    assert summed.name == "CUDA C++, sum_kernel, 1 forms"
    assert (summed.registers, summed.shared_bytes) == (22, 2048)
    assert mixed.name == "CUDA C++, mix_kernel, 2 forms"
    assert (mixed.capability, mixed.registers, mixed.local_bytes) == (90, 60, 24)
    assert mixed.problems == ("1 use up to 24 bytes of local memory",)


def test_others_are_left_out() -> None:
    assert _cuda_check.read(USAGE, ["scan"], [80, 90]) == []
    assert [case.capability for case in _cuda_check.read(USAGE, ["mix"], [90])] == [90]


def test_a_name_that_is_none_of_ours_raises() -> None:
    with pytest.raises(RuntimeError, match="not a kernel of a"):
        _cuda_check.read(USAGE.replace("mix_cuda", "mix_cudo"), ["mix"], [80])


def test_without_a_library_there_is_nothing(tmp_path: Path) -> None:
    assert _cuda_check.kernels(["mix"], [90], tmp_path / "none.so") == []


def test_the_built_library() -> None:
    reason = native.skip_reason() or cuda.skip_reason() or available.version_reason()
    if reason is not None:
        pytest.skip(f"no CUDA library, or none to read it with: {reason}")
    found = _cuda_check.kernels(["mix", "reservoir"], [80, 90, 100])
    assert {case.op for case in found} == {"mix", "reservoir"}
    assert all(case.ok and 0 < case.registers <= 255 for case in found), found
    arguments = ("--op", "reservoir", "--filter", "recurrence_kernel", "--brief")
    done = run(["-m", "resformer_kernels.cli", "compile-check"], *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("CUDA C++, recurrence_kernel, 4 forms") == 3

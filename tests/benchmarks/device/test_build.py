"""The build of the CUDA library that `device-check` starts."""

from __future__ import annotations

import sys
import time
from types import ModuleType
from typing import Any

import pytest

from benchmarks.device.build import Build
from benchmarks.device.record import DeviceRun


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A compiler that is pretended to be there."""
    module: Any = ModuleType("build_support.cuda")
    module.find_nvcc = lambda: "/usr/local/cuda/bin/nvcc"
    monkeypatch.setitem(sys.modules, "build_support.cuda", module)
    return module


def build(program: str, capability: tuple[int, int] = (9, 0)) -> Build:
    return Build(capability, (sys.executable, "-c", program))


def finished(started: Build, seconds: float = 30.0) -> tuple[str, bool]:
    return started.finish(time.monotonic() + seconds)


@pytest.mark.usefixtures("nvcc")
@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), "9.0a"), ((8, 6), "8.6"), ((10, 0), "10.0")]
)
def test_it_is_built_for_this_gpu(capability: tuple[int, int], expected: str) -> None:
    program = f"import os; assert os.environ['RESFORMER_CUDA_ARCHS'] == {expected!r}"
    assert finished(build(program, capability)) == ("built", False)


@pytest.mark.usefixtures("nvcc")
def test_a_source_that_does_not_compile_is_a_failure() -> None:
    program = "import sys; sys.exit('x.cu(3): error\\nerror: compiling the native library failed')"
    outcome, failed = finished(build(program))
    assert failed
    assert "x.cu(3): error" in outcome
    run = DeviceRun({}, {}, "sm90")
    run.built(outcome, failed)
    assert run.failures[0]["job"] == "build"
    assert run.as_json()["notes"]["CUDA library"] == outcome


@pytest.mark.usefixtures("nvcc")
def test_a_missing_tool_is_none() -> None:
    outcome, failed = finished(build("import sys; sys.exit('error: ninja was not found')"))
    assert outcome == "not built: error: ninja was not found"
    assert not failed


@pytest.mark.usefixtures("nvcc")
def test_it_has_its_time() -> None:
    begun = time.monotonic()
    assert finished(build("import time; time.sleep(60)"), 0.2) == (
        "not built: the time was up",
        False,
    )
    assert time.monotonic() - begun < 20


def test_without_nvcc_nothing_is_started(nvcc: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc.find_nvcc = lambda: None
    assert finished(build("raise SystemExit(1)")) == ("not built: there is no nvcc", False)
    monkeypatch.setitem(sys.modules, "build_support.cuda", None)
    assert finished(build("raise SystemExit(1)"))[0].endswith("no CUDA sources")

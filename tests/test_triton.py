"""Whether Triton can serve a device, decided without a GPU."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from resformer_kernels._triton.available import interpreted, unavailable_reason

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device of capability 9.0, as far as anyone asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)


def reason(device: torch.device) -> str:
    found = unavailable_reason(device)
    assert found is not None
    return found


def test_cpu_tensors_run_in_the_interpreter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert interpreted()
    assert unavailable_reason(torch.device("cpu")) is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not interpreted()
    assert "on the CPU" in reason(torch.device("cpu"))


def test_other_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MPS" in reason(torch.device("mps"))
    assert "xpu" in reason(torch.device("xpu"))
    assert "meta" in reason(torch.device("meta"))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in reason(CUDA)


@pytest.mark.usefixtures("gpu")
def test_a_recent_gpu_serves() -> None:
    pytest.importorskip("triton")
    assert unavailable_reason(CUDA) is None


@pytest.mark.usefixtures("gpu")
def test_an_old_gpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert "capability 8.0 or newer, cuda:0 has 7.5" in reason(CUDA)


@pytest.mark.usefixtures("gpu")
def test_triton_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("triton")
    old.__version__ = "3.5.1"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", old)
    assert "3.6 or newer, 3.5.1 is installed" in reason(CUDA)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "not installed" in reason(CUDA)

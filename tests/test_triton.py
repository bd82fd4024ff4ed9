"""Whether Triton can serve a device, decided without a GPU."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from resformer_kernels._core.hardware import MACHINE
from resformer_kernels._triton import arch, available
from resformer_kernels._triton.available import (
    interpreted,
    served_on_cpu,
    unavailable_reason,
)

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device of capability 9.0, as far as anyone asks."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)


def amd(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The GPU is AMD's, as far as anyone asks."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = types.SimpleNamespace(gcnArchName=name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)


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
    with served_on_cpu():
        assert unavailable_reason(torch.device("cpu")) is None
    assert "on the CPU" in reason(torch.device("cpu"))


def test_other_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "MPS" in reason(torch.device("mps"))
    assert "xpu" in reason(torch.device("xpu"))
    assert "meta" in reason(torch.device("meta"))
    amd(monkeypatch, "gfx90a")
    assert reason(CUDA) == (
        "of AMD's GPUs it is compiled for gfx942 and gfx950 alone, cuda:0 is another"
    )
    amd(monkeypatch, "gfx1100")
    assert "compiled for gfx942 and gfx950 alone" in reason(CUDA)


def test_gpus_of_amd_serve_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    for name in ("gfx942:sramecc+:xnack-", "gfx950"):
        amd(monkeypatch, name)
        assert unavailable_reason(CUDA) is None
        assert "backend='triton' takes them" in str(available.reason_against_auto(CUDA))
        assert MACHINE.triton_notes(CUDA) == ["compiled for gfx9, and not yet run on such a GPU"]


@pytest.mark.usefixtures("gpu")
def test_what_no_run_shows_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.7.1")
    assert available.reason_against_auto(CUDA) is None
    assert MACHINE.triton_notes(torch.device("cpu")) == []
    assert MACHINE.triton_notes(CUDA) == ["compiled for sm90, and not yet run on such a GPU"]
    monkeypatch.setattr(arch, "RAN", frozenset({"sm90"}))
    assert MACHINE.triton_notes(CUDA) == []
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    (note,) = MACHINE.triton_notes(CUDA)
    assert "Triton 3.6.0: products read what cp.async copied" in note
    assert "mended in 3.7.1" in note


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

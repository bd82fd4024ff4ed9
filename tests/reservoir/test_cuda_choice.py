"""Which backend serves tensors on a GPU, and what the others are said to lack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from resformer_kernels import explain, reservoir_scan
from resformer_kernels._core import extension
from resformer_kernels._triton import available


def on_cuda(*shape: int) -> Tensor:
    return torch.empty(*shape, device="cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 with the CUDA library and Triton."""
    monkeypatch.setattr(extension, "cuda_unavailable_reason", lambda _device: None)
    monkeypatch.setattr(extension, "cuda_memory", lambda _device: (132, 227 * 1024))
    monkeypatch.setattr(available, "unavailable_reason", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))


@pytest.mark.parametrize(
    ("inputs", "weight", "options", "reason"),
    [
        ((2, 9, 1024), (1024, 1024), {}, None),
        ((2, 9, 1024), (16, 64, 64), {}, None),
        ((2, 9, 1024), (1024,), {}, "takes dense and grouped weights"),
        ((2, 9, 1024), (1024, 1024), {"mode": "chunked"}, "goes step after step"),
        ((2, 9, 4096), (4096, 4096), {}, "4096 units in groups of 4096 with 2"),
        ((900, 9, 1024), (1024, 1024), {}, "with 900 sequences do not fit into 132 times"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("gpu")
def test_what_a_gpu_is_told(
    monkeypatch: pytest.MonkeyPatch,
    inputs: tuple[int, ...],
    weight: tuple[int, ...],
    options: dict[str, Any],
    reason: str | None,
) -> None:
    monkeypatch.setattr(available, "unavailable_reason", lambda _device: "it is not installed")
    with FakeTensorMode():
        found = explain(reservoir_scan, on_cuda(*inputs), on_cuda(*weight), **options)
    if reason is None:
        assert found.backend == "native"
        assert found.notes == ["mode='auto' is sequential: its CUDA kernel does not split time"]
    else:
        assert found.backend == "reference"
        assert reason in found.reasons["native"]


@pytest.mark.usefixtures("gpu")
def test_triton_is_preferred_on_a_gpu() -> None:
    with FakeTensorMode():
        u, weight = on_cuda(2, 9, 64), on_cuda(64, 64)
        assert explain(reservoir_scan, u, weight).backend == "triton"
        assert explain(reservoir_scan, u, weight, backend="native").backend == "native"

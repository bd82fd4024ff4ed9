"""Whether native kernels serve a device, decided without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from resformer_kernels import explain, mix_value_embedding, mix_values
from resformer_kernels._core import extension

CUDA = torch.device("cuda", 0)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Clear the cached state of the CUDA library before and after the test."""

    def forget() -> None:
        extension.cuda_library_reason.cache_clear()
        extension._cuda_device_reason.cache_clear()

    forget()
    yield monkeypatch
    forget()


@pytest.fixture
def gpu(fresh: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Simulate a CUDA device with a driver and a library for it."""
    fresh.setattr(extension, "_load", lambda *_: None)
    fresh.setattr(torch.cuda, "is_available", lambda: True)
    capability(fresh, (9, 0))
    versions(fresh, runtime=13000, driver=13010, built="8.0 9.0a 10.0")
    return fresh


def capability(patch: pytest.MonkeyPatch, found: tuple[int, int]) -> None:
    patch.setattr(torch.cuda, "get_device_capability", lambda _device: found)


def versions(patch: pytest.MonkeyPatch, *, runtime: int, driver: int, built: str) -> None:
    for name, value in (
        ("cuda_runtime_version", runtime),
        ("cuda_driver_version", driver),
        ("cuda_architectures", built),
    ):
        patch.setattr(torch.ops.resformer, name, lambda value=value: value)


def reason() -> str:
    found = extension.cuda_unavailable_reason(CUDA)
    assert found is not None
    return found


def test_other_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def foreign(kind: str, cuda: bool = True) -> str | None:
        return extension.foreign_device(torch.device(kind), cuda=cuda)

    assert foreign("cpu") is None
    assert foreign("cuda") is None
    assert foreign("cuda", cuda=False) == "it runs on CPU tensors, these are on cuda"
    assert "Apple's MPS" in str(foreign("mps"))
    assert "CPU and CUDA tensors, these are on xpu" in str(foreign("xpu"))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in str(foreign("cuda"))


@pytest.mark.usefixtures("gpu")
def test_a_recent_gpu_serves() -> None:
    assert extension.cuda_unavailable_reason(CUDA) is None


@pytest.mark.parametrize(
    ("built", "device", "serves"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 9), True),
        ("8.6", (8, 0), False),
        ("8.0", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("10.0", (10, 3), True),
        ("10.0a", (10, 3), False),
        ("10.0f", (10, 3), True),
        ("8.0 9.0a 10.0", (12, 0), False),
        ("8.0 9.0a 10.0 10.0+PTX", (12, 0), True),
        ("10.0+PTX", (9, 0), False),
        ("8.6+PTX", (8, 0), False),
    ],
)
def test_machine_code_runs_where_it_was_made_for(
    gpu: pytest.MonkeyPatch, built: str, device: tuple[int, int], serves: bool
) -> None:
    versions(gpu, runtime=13000, driver=13000, built=built)
    capability(gpu, device)
    if serves:
        assert extension.cuda_unavailable_reason(CUDA) is None
    else:
        assert f"RESFORMER_CUDA_ARCHS={device[0]}.{device[1]}" in reason()


def test_a_missing_library_is_a_reason(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(extension, "CUDA_LIBRARY", tmp_path / "none.so")
    assert "the CUDA library is not built" in reason()


def test_a_broken_library_is_a_reason(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    fresh.setattr(extension, "CUDA_LIBRARY", broken)
    assert "the CUDA library does not load" in reason()


def test_no_device_is_a_reason(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in reason()


def test_an_old_driver_is_a_reason(gpu: pytest.MonkeyPatch) -> None:
    versions(gpu, runtime=13000, driver=12080, built="9.0a")
    assert "built with CUDA 13.0, and the driver runs up to CUDA 12.8" in reason()
    versions(gpu, runtime=12040, driver=12020, built="9.0a")
    extension._cuda_device_reason.cache_clear()
    assert extension.cuda_unavailable_reason(CUDA) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_code_sees_the_reason_as_a_constant() -> None:
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def add(x: torch.Tensor) -> torch.Tensor:
        return x if extension.cuda_unavailable_reason(x.device) is None else x + 1

    served = extension.cuda_unavailable_reason(torch.device("cpu")) is None
    assert torch.equal(add(torch.zeros(2)), torch.full((2,), 0.0 if served else 1.0))


@pytest.mark.usefixtures("gpu")
def test_mix_values_has_a_cuda_kernel_and_the_embedding_none() -> None:
    with FakeTensorMode():
        v = torch.empty(1, 4, 2, 8, device=CUDA)
        table = torch.empty(5, 2, 8, device=CUDA)
        ids = torch.empty(1, 4, dtype=torch.int64, device=CUDA)
        assert explain(mix_values, [v, v], [0.5, 0.5]).backend == "native"
        found = explain(mix_value_embedding, v, table, ids, 0.5)
    assert found.reasons["native"] == "it runs on CPU tensors, these are on cuda:0"

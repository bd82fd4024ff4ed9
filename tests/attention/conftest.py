"""The backends of attention that run here."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from resformer_kernels._core.hardware import MACHINE
from resformer_kernels.attention import flash_attn
from tests.attention.fake_flash_attn import Fake, Install


@pytest.fixture(params=["native", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    """Each backend that has kernels: compiled ones, and Triton's in its interpreter."""
    name: str = request.param
    request.getfixturevalue("native" if name == "native" else "interpreter")
    return name


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs on a CPU."""
    name: str = request.param
    if name != "reference":
        request.getfixturevalue("native" if name == "native" else "interpreter")
    return name


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a fake package in place, and let CPU tensors through."""
    monkeypatch.setattr(flash_attn, "_device_reason", lambda _device, _hardware: None)
    monkeypatch.setattr(MACHINE, "capability", lambda _device: (9, 0))
    monkeypatch.setattr(MACHINE, "packages", {})

    def put(module: str = "flash_attn", without: tuple[str, ...] = ()) -> Fake:
        fake = Fake(2 if module == "flash_attn" else 3)
        monkeypatch.setitem(sys.modules, module, fake.module(module))
        if module != "flash_attn":
            config: Any = ModuleType("config")
            flags = {f"FLASHATTENTION_DISABLE_{name}": name in without for name in _FEATURES}
            config.CONFIG = {"build_flags": {**flags, "FLASHATTENTION_ENABLE_VCOLMAJOR": True}}
            name = module.replace("interface", "config")
            monkeypatch.setitem(sys.modules, name, config)
        return fake

    return put


_FEATURES = (
    *("BACKWARD", "LOCAL", "SOFTCAP", "FP16", "VARLEN"),
    *("HDIM64", "HDIM96", "HDIM128", "HDIM192", "HDIM256"),
)

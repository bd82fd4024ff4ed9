"""`make test-fa4`: FlashAttention 4's kernels, compiled with no GPU for `--capability`.

They run in an environment of their own, which holds the package (`requirements-fa4.txt`); elsewhere
nothing here is collected. The package takes its target from the process' environment, once.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

collect_ignore_glob = [] if find_spec("cutlass") else ["test_*.py"]

MULTIPROCESSORS = {9: 132, 10: 148}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--capability", type=int, default=9, help="compile for 9 (default) or 10")
    parser.addoption(
        "--every", action="store_true", help="compile every pair of head sizes that is served"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Name the target, before the package is imported. A run of all tests has no such option."""
    major = config.getoption("--capability", default=None)
    if major is None:
        return
    os.environ["CUTE_DSL_ARCH"] = f"sm_{major}0a"
    os.environ["FLASH_ATTENTION_ARCH"] = f"sm_{major}0"
    os.environ["FLASH_ATTENTION_NUM_SMS"] = str(MULTIPROCESSORS[major])


@pytest.fixture
def major(request: pytest.FixtureRequest) -> int:
    """The major compute capability that kernels are compiled for."""
    found: int = request.config.getoption("--capability")
    return found


@pytest.fixture
def no_gpu(major: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within it tensors have no memory, and a call of the package compiles and launches nothing.

    Three questions to the driver are answered in its place: which device is current, where the
    flags of a deterministic backward lie, and how many blocks a GPU holds.
    """
    utils: Any = importlib.import_module("flash_attn.cute.utils")
    from_memory = utils.convert_from_dlpack_leading_static

    def from_shape(flags: Tensor, **options: Any) -> Any:
        with unset_fake_temporarily():
            return from_memory(torch.zeros(flags.shape, dtype=flags.dtype), **options)

    class Supposed:
        def get_max_active_clusters(self, blocks: int) -> int:
            return MULTIPROCESSORS[major] // blocks

        def get_device_multiprocessor_count(self) -> int:
            return MULTIPROCESSORS[major]

    monkeypatch.setattr(utils, "convert_from_dlpack_leading_static", from_shape)
    monkeypatch.setattr("cutlass.utils.HardwareInfo", Supposed)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _x: nullcontext())
    with FakeTensorMode():
        yield

"""`make test-vllm`: vLLM serves tiny models, and its tokens are held to transformers'.

They run in an environment of their own (`requirements-vllm.txt`). Without `--vllm` nothing here is
collected; with it, a vLLM that is missing is a failure.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--vllm", action="store_true", help="run the tests of vLLM's plugin")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    wanted = config.getoption("--vllm", default=False)
    return None if wanted or not collection_path.name.startswith("test_") else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let vLLM's and transformers' own warnings pass."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder of every tiny model, and what transformers generates with it."""
    from tests.vllm.tiny import save_all

    return save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def engines(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Starts processes of vLLM that serve those models."""
    from tests.vllm.process import Engines

    return Engines(models, tmp_path_factory.mktemp("engines"))

"""vLLM's plugin where vLLM is absent, of another version, or broken: it says so and raises nothing.

`make test-vllm` runs it in vLLM itself.
"""

from __future__ import annotations

import ast
import importlib
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from resformer_kernels.integrations import vllm as plugin

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "resformer_kernels" / "integrations" / "vllm"


def _supposed(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_the_entry_point_is_register() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    found = re.search(
        r'entry-points\."vllm\.general_plugins"\]\nresformer = "([\w.]+):(\w+)"', text
    )
    assert found is not None
    assert getattr(importlib.import_module(found[1]), found[2]) is plugin.register


def test_import_needs_neither_vllm_nor_transformers() -> None:
    program = """
import sys
sys.modules["vllm"] = sys.modules["transformers"] = None
import resformer_kernels.integrations.vllm
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


def test_absent_vllm(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    plugin.register()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "could not register" in record.message
    assert record.exc_info is not None
    assert record.exc_info[0] is ModuleNotFoundError


@pytest.mark.parametrize("version", ["0.31.9", "0.33.0", "1.0", "0.33.0rc1+cpu", "dev", None])
def test_other_versions(
    version: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _supposed(monkeypatch, "vllm", __version__=version)
    plugin.register()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"it takes vLLM 0.32 or newer and below 0.33, got {version}" in record.message


@pytest.mark.parametrize("version", ["0.32.0", "0.32.4+cpu", "0.32.0rc2"])
def test_versions_that_are_served(
    version: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("transformers")
    registered: dict[str, str] = {}

    class Registry:
        register_model = registered.__setitem__

    _supposed(monkeypatch, "vllm", __version__=version, ModelRegistry=Registry())
    for name in ("v1", "v1.attention", "v1.attention.backends"):
        _supposed(monkeypatch, f"vllm.{name}")
    registry = "vllm.v1.attention.backends.registry"
    backends = SimpleNamespace(__members__={})
    _supposed(
        monkeypatch,
        registry,
        register_backend=registered.__setitem__,
        AttentionBackendEnum=backends,
    )
    plugin.register()
    assert caplog.records == []
    assert registered.keys() == {plugin.BACKEND, *plugin.MODELS}
    for target in registered.values():
        module, name = re.fullmatch(r"([\w.]+)[:.](\w+)", target).groups()  # type: ignore[union-attr]
        tree = ast.parse((FOLDER / f"{module.rpartition('.')[2]}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    # vLLM loads plugins again: what is there is left alone.
    backends.__members__[plugin.BACKEND] = None
    registered.clear()
    plugin.register()
    assert registered == {}


def test_a_vllm_that_moved_its_parts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _supposed(monkeypatch, "vllm", __version__="0.32.0")
    plugin.register()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "Traceback" in caplog.text


def test_models_have_the_names_that_transformers_saves() -> None:
    pytest.importorskip("transformers")
    from resformer_kernels.integrations.transformers import families

    assert all(hasattr(families, architecture) for architecture in plugin.MODELS)

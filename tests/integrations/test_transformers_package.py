"""Requirements and errors of the import, and the example."""

from __future__ import annotations

import importlib.metadata
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations.tiny import QUIET, version

pytestmark = [*QUIET]

ROOT = Path(__file__).resolve().parents[2]


def test_the_package_does_not_import_transformers() -> None:
    code = (
        "import sys, resformer_kernels, resformer_kernels.integrations, resformer_kernels.models;"
        "assert not {'transformers', 'peft', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_missing_or_old_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match=r"needs transformers: pip install 'resformer-kernels\["):
        version.installed()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "5.9.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.17 or newer, got 5\.9\.1"):
        version.installed()


@pytest.mark.parametrize(
    ("installed", "served"),
    [("5.18.0", False), ("5.19.0", True), ("5.23.1", True), ("5.24.0.dev0", False)],
)
def test_continuous_batching_is_served_where_its_pages_are_known(
    installed: str, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: installed)
    assert version.serves_batching() is served


def test_the_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["convert_llama.py", "--steps", "2"])
    runpy.run_path(str(ROOT / "examples/convert_llama.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "logits equal to the Llama's: True" in printed
    # 6 layers: 12 slots of keys and values, or 7. 44 tokens, 2 heads of 32, float32.
    assert f"ResFormerLlamaForCausalLM: {12 * 44 * 2 * 32 * 4} bytes" in printed
    assert f"SVFormerLlamaForCausalLM: {7 * 44 * 2 * 32 * 4} bytes" in printed

"""The READMEs' examples run in order, as a reader would paste them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def run_examples(path: str, least: int) -> dict[str, Any]:
    """Run the examples of a README; return the names they define."""
    text = (ROOT / path).read_text()
    examples = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert len(examples) >= least
    names: dict[str, Any] = {}
    exec("\n".join(examples), names)
    return names


def test_examples_run() -> None:
    assert run_examples("README.md", 3)["x"].shape == (1, 1024, 512)


def test_examples_of_the_modules_run() -> None:
    run_examples("resformer_kernels/nn/README.md", 5)

"""The README's examples run, one after the other, as a reader would paste them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parent.parent / "README.md"


def test_examples_run() -> None:
    examples = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    assert len(examples) >= 3
    names: dict[str, Any] = {}
    exec("\n".join(examples), names)
    assert names["x"].shape == (1, 1024, 512)

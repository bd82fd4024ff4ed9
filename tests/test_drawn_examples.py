"""Examples that Hypothesis draws do not depend on what ran before."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def drawn() -> list[int]:
    found: list[int] = []

    @settings(max_examples=200, database=None, derandomize=True)
    @given(st.integers(0, 10**6))
    def take(number: int) -> None:
        found.append(number)

    take()
    return found


def test_modules_loaded_later_change_no_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = drawn()
    source = tmp_path / "numbers_of_a_module.py"
    source.write_text(f"NUMBERS = {list(range(1001, 2000))}\n")
    module = types.ModuleType("numbers_of_a_module")
    module.__file__ = str(source)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert drawn() == before

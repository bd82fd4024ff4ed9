"""`pytest tests/families --families FILE` holds every family to eager, and writes a table there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

FOUND: dict[str, list[dict[str, Any]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--families",
        metavar="FILE",
        help="hold every family of transformers to eager (otherwise a few), and write the table",
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Gather what the tests record; with xdist this runs where all reports arrive."""
    if report.when == "call":
        for name, value in report.user_properties:
            if name == "results" and isinstance(value, dict):
                FOUND.update(value)


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--families", default=None)
    if path is None or not FOUND or hasattr(session.config, "workerinput"):
        return
    from tests.families.report import table

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(table(FOUND))

"""`make serve` serves both models, and leaves nothing running, also where it is interrupted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serve_svformer.py"


def start(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), "--layers", "2", "--memory", "16", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


@pytest.mark.slow
def test_both_models_are_served() -> None:
    printed, _ = start("--tokens", "8").communicate(timeout=400)
    # A page of Llama's: 4 K and V of 128 tokens, 4 heads, 32 channels, 2 bytes.
    llama = (16 << 20) // (4 * 128 * 4 * 32 * 2)
    rows = dict(re.findall(r"^(Llama|SVFormer) +(\d+) +\d+$", printed, re.M))
    assert rows == {"Llama": str(llama), "SVFormer": str(llama * 4 // 3)}, printed
    assert printed.count("8 tokens") == 4
    assert "1.33 times the blocks; 2L / (L + 1) = 1.33" in printed


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(number: signal.Signals) -> None:
    process = start()
    assert process.stdout is not None
    while "starting vLLM" not in (line := process.stdout.readline()):
        assert line
    servers = psutil.Process(process.pid).children(recursive=True)
    assert servers
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == (1 if number == signal.SIGINT else 143)
    _, alive = psutil.wait_procs(servers, timeout=10)
    assert alive == []

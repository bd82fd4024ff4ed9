"""The description of a machine, and the peak memory of a call."""

from __future__ import annotations

import re
import sys

import pytest
import torch

from benchmarks.peak_memory import peak_extra_bytes
from resformer_kernels.bench import machine


def test_a_machine_is_described() -> None:
    described = machine.describe()
    assert described["threads"] == torch.get_num_threads()
    assert described["torch"] == torch.__version__
    assert described["processor"]
    assert re.fullmatch(r"[0-9a-f]{12}\+?|unknown", str(described["commit"]))
    assert re.fullmatch(r"[a-z0-9-]+", machine.slug())


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_measured_in_a_process_of_its_own(native: str) -> None:
    assert native == "native"
    length, heads, head_dim = 4096, 4, 64
    extra = peak_extra_bytes(length, heads=heads, head_dim=head_dim, dtype=torch.float32, threads=1)
    tensor = length * heads * head_dim * 4
    # out and the four gradients have to exist; every score would be 64 times more.
    assert 5 * tensor <= extra < 20 * tensor


def test_a_failing_measurement_says_why() -> None:
    # The message is a traceback: "." has to match its line ends.
    with pytest.raises(RuntimeError, match=r"(?s)measuring peak memory failed.*complex64"):
        peak_extra_bytes(16, heads=1, head_dim=8, dtype=torch.complex64, threads=1)

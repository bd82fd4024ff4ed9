"""Time GPU code by the GPU's clock, with a cold L2 cache and no gaps between launches."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable

import torch

from resformer_kernels.bench.timing import Timer, host_timer

_MIN_SCRATCH_BYTES = 256 * 2**20
_HEAD_START_CYCLES = 2_000_000
"""About a millisecond, for the host to get a few launches ahead of the device."""
_QUERY = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw"


class DeviceTimer:
    """A `Timer` of device time: `timer(call, repeats)`.

    CUDA events time each call, after the L2 cache is overwritten. The device is kept busy until the
    host has launched the call: launch overhead that a training step hides is hidden here too. Gaps
    that remain between the kernels of a call count.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        cache = torch.cuda.get_device_properties(self._device).L2_cache_size
        size = max(_MIN_SCRATCH_BYTES, 4 * cache)
        self._scratch = torch.empty(size, dtype=torch.uint8, device=self._device)

    def __call__(self, call: Callable[[], object], repeats: int) -> float:
        """The mean seconds of one call."""
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        with torch.cuda.device(self._device):
            for start, end in pairs:
                self._scratch.zero_()
                torch.cuda._sleep(_HEAD_START_CYCLES)
                start.record()
                call()
                end.record()
            torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / repeats / 1e3


def timer_for(device: torch.device | str) -> Timer:
    """A timer of what runs on `device`."""
    return DeviceTimer(device) if torch.device(device).type == "cuda" else host_timer


def readings() -> dict[str, str]:
    """Driver, clocks, temperature and power of the first GPU, as nvidia-smi reads them now."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    if done.returncode:
        return {}
    return dict(zip(_QUERY.split(","), (x.strip() for x in done.stdout.split(",")), strict=True))

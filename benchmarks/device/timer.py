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
_QUERY = ("driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The query for what holds the clocks back, as newer and as older drivers call it."""
_SLOWDOWNS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
"""Reasons that lower the clocks under load, by their bits in NVML."""
_SMI_SECONDS = 10.0
NO_READINGS = "nvidia-smi is not here: clocks, temperature, power and throttling are not recorded"


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
    """Driver, clocks, temperature, power and throttling of the first GPU, as nvidia-smi reads them
    now; without it, or where it does not answer, that alone."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"unread": NO_READINGS}
    said = ""
    for reasons in _REASONS:
        names = [*_QUERY, reasons]
        command = [tool, f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_SMI_SECONDS
            )
        except subprocess.TimeoutExpired:
            return {"unread": f"nvidia-smi did not answer in {_SMI_SECONDS:.0f} s"}
        said = (done.stdout or done.stderr).strip()
        if done.returncode == 0:
            *values, active = (value.strip() for value in done.stdout.split(","))
            return {**dict(zip(_QUERY, values, strict=True)), "throttled": throttled(active)}
    return {"unread": f"nvidia-smi failed: {said[:100]}"}


def throttled(active: str) -> str:
    """What lowers the clocks, from NVML's bits in hexadecimal: "no", reasons, or the text given
    where it is no number."""
    try:
        bits = int(active, 16)
    except ValueError:
        return active
    return ", ".join(name for bit, name in _SLOWDOWNS.items() if bits & bit) or "no"

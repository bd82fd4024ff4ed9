"""The GPU's cases, tried out on a CPU; and the GPU's timer, on a fake GPU."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.device import timer as device_timer
from benchmarks.device.timer import DeviceTimer, timer_for
from benchmarks.workloads import device as device_workloads
from benchmarks.workloads.device import (
    DEVICE_PEERS,
    FA3,
    FA4,
    FLEX,
    SDPA_CUDNN,
    SDPA_FLASH,
    DeviceAttention,
)
from benchmarks.workloads.mix import MixBenchmark
from resformer_kernels.bench.timing import OURS, Unavailable, host_timer

CASE = DeviceAttention(
    *(2, 4, 2, 64, 16, torch.bfloat16, "forward"), peers=(*DEVICE_PEERS, FLEX), device="cpu"
)


def test_flops_and_names() -> None:
    full = replace(CASE, causal=False, kv_heads=4)
    assert full.flops == 4 * 2 * 4 * 64 * 64 * 16
    assert CASE.flops == 4 * 2 * 4 * (64 * 65 // 2) * 16
    assert replace(full, direction="backward").flops == 2.5 * full.flops
    assert full.name == "attention forward B2 H4 T64 D16 full bfloat16"
    assert CASE.name == "attention forward B2 Hq4 Hkv2 T64 D16 causal bfloat16"
    assert replace(CASE, direction="backward").bytes == 2 * CASE.bytes


def install_flash_attn_3(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    module: Any = ModuleType(name)
    module.flash_attn_func = flash_attn_3
    monkeypatch.setitem(sys.modules, name, module)


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, None]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2), None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("causal", [True, False])
def test_contestants_compute_the_same(
    direction: str, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_flash_attn_3(monkeypatch, "flash_attn_interface")
    install_flash_attn_3(monkeypatch, "flash_attn.cute")
    monkeypatch.setattr(device_workloads, "compiled", lambda function: function)
    makers = replace(CASE, direction=direction, causal=causal).makers()
    # Torch's FlexAttention has no backward on a CPU.
    names = (OURS, SDPA_FLASH, FA3, FA4, *((FLEX,) if direction == "forward" else ()))
    found = {name: makers[name]() for name in names}
    expected = found[OURS]()
    for name, call in found.items():
        result: Any = call()
        torch.testing.assert_close(result, expected, atol=0.05, rtol=0.05, msg=name)
        # Again: a backward keeps its graph.
        torch.testing.assert_close(call(), result, msg=name)


def test_what_is_not_here_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn_interface", "fa3_fwd_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)
    makers = CASE.makers()
    with pytest.raises(Unavailable, match="flash_attn_interface"):
        makers[FA3]()()
    with pytest.raises(Unavailable, match="flash_attn"):
        makers[FA4]()()
    with pytest.raises(RuntimeError):
        makers[SDPA_CUDNN]()()
    with pytest.raises(Unavailable, match="no kernel serves it"):
        # Nothing but the reference computes in float64.
        replace(CASE, dtype=torch.float64).makers()[OURS]()
    # A build without a backward serves what it can.
    install_flash_attn_3(monkeypatch, "fa3_fwd_interface")
    makers[FA3]()()
    with pytest.raises(Unavailable, match="no backward"):
        replace(CASE, direction="backward").makers()[FA3]()


def test_the_reference_is_not_timed_as_ours_on_a_device() -> None:
    case = MixBenchmark(2, 1, 8, 2, 8, torch.bfloat16, "forward", device="meta")
    with pytest.raises(Unavailable, match="no kernel serves it"):
        case.makers()[OURS]()


def test_each_call_meets_a_cold_cache_and_a_busy_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, clock = MagicMock(), iter(range(10_000))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            cuda.record()
            self.at = next(clock)

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    cuda.Event = Event
    cuda.get_device_properties.return_value.L2_cache_size = 100 * 2**20
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "empty", cuda.empty)
    timer = timer_for("cuda")
    assert isinstance(timer, DeviceTimer)
    assert timer(cuda.call, 2) == 1e-3
    told = [name for name, *_ in cuda.mock_calls if "device" not in name]
    once = ["empty().zero_", "_sleep", "record", "call", "record"]
    assert told == ["empty", *once, *once, "synchronize"]
    assert cuda.empty.call_args.args == (400 * 2**20,)


def test_other_devices_are_timed_by_the_host() -> None:
    assert timer_for("cpu") is host_timer


SMI = """#!/bin/sh
case "$1" in
*clocks_event_reasons*) [ -n "$OLD_DRIVER" ] && echo "not a valid field" && exit 2 ;;
esac
[ -n "$NO_DRIVER" ] && echo "no devices were found" && exit 9
echo "580.1, 1980 MHz, 3201 MHz, 40, 120 W, 0x0000000000000064"
"""


def test_readings_are_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert device_timer.readings() == {"unread": device_timer.NO_READINGS}
    tool = tmp_path / "nvidia-smi"
    tool.write_text(SMI)
    tool.chmod(0o755)
    found = device_timer.readings()
    assert (found["clocks.sm"], found["power.draw"]) == ("1980 MHz", "120 W")
    assert found["throttled"] == "power cap, temperature, temperature (hardware)"
    monkeypatch.setenv("OLD_DRIVER", "1")
    assert device_timer.readings() == found
    monkeypatch.setenv("NO_DRIVER", "1")
    assert device_timer.readings() == {"unread": "nvidia-smi failed: no devices were found"}


@pytest.mark.parametrize(
    ("active", "expected"),
    [("0x0", "no"), ("0x1", "no"), ("0x8", "hardware slowdown"), ("N/A", "N/A")],
)
def test_only_what_slows_it_under_load_is_throttling(active: str, expected: str) -> None:
    assert device_timer.throttled(active) == expected

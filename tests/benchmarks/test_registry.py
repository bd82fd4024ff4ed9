"""The registry's cases, and the figures its report derives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rich.console import Console

from benchmarks import registry, report, runner
from benchmarks.runner import MemoryPoint, Run
from benchmarks.workloads.epilogue import PASSES, EpilogueBenchmark
from benchmarks.workloads.mix import MixBenchmark
from benchmarks.workloads.model import ModelBenchmark
from resformer_kernels.bench import machine
from resformer_kernels.bench.attention import HEADS_FIRST, SDPA, TIME_FIRST
from resformer_kernels.bench.timing import OURS, Call, Result, Timing, Unavailable


@pytest.mark.parametrize("quick", [False, True])
def test_names_are_unique_and_every_case_has_its_data(quick: bool) -> None:
    cases = registry.cases(quick=quick)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case.bytes > 0
        assert case.flops > 0 or case.group.split()[0] in ("mix", "decode", "scan")


def test_the_shapes_that_speed_is_promised_for_are_there() -> None:
    names = {case.name for case in registry.cases()}
    for shape in (
        "B1 H16 T4096 D64",
        "B1 H8 T2048 D128",
        "B1 Hq16 Hkv4 T4096 D64",
        "B8 H8 T256 D64",
    ):
        for direction in ("forward", "backward"):
            for dtype in ("float32", "bfloat16"):
                for kind in ("attention", "exclusive"):
                    assert f"{kind} {direction} {shape} causal {dtype}" in names
    assert "attention forward B1 H4 T16384 D64 causal window 512 bfloat16" in names
    for shape in ("B1 Hq32 Hkv8 T8192 D128", "B8 Hq16 Hkv8 T1024 D64"):
        for dtype in ("float32", "bfloat16"):
            for layout in ("", ", caches (B,H,T,D)"):
                assert f"decode {shape}, 12 layers, V a layer{layout}, {dtype}" in names
    assert "decode B1 Hq16 Hkv8 T8192 D64, 12 layers, one V, bfloat16" in names
    assert max(registry.memory_lengths()) == 32768


def test_decoding_covers_batches_contexts_and_groups() -> None:
    names = {case.name for case in registry.cases(quick=False) if case.group == "decode"}
    for heads in (8, 32, 64):
        for batch, length in ((1, 1024), (1, 65536), (8, 8192), (32, 2048)):
            for kind in ("V a layer", "one V"):
                shape = f"B{batch} Hq{heads} Hkv8 T{length} D64"
                assert f"decode {shape}, 12 layers, {kind}, bfloat16" in names
    most = max(case.bytes for case in registry.cases() if case.group == "decode")
    assert most < 2 * 2**30, "and its peers' copies must fit a laptop's memory"


@pytest.mark.parametrize("direction", registry.DIRECTIONS)
def test_exclusive_outputs_are_the_same_one_way_and_the_other(direction: str) -> None:
    peers = (PASSES, HEADS_FIRST, TIME_FIRST)
    case = EpilogueBenchmark(2, 4, 2, 40, 16, torch.float32, direction, peers=peers)
    found: dict[str, Any] = {name: make()() for name, make in case.makers().items()}
    if direction == "forward":
        first, *others = (x.transpose(1, 2) if name in SDPA else x for name, x in found.items())
        for other in others:
            torch.testing.assert_close(other, first)
    else:  # the gradients of the outputs that SDPA gives have other numbers
        torch.testing.assert_close(found[OURS], found[PASSES])


def test_a_case_that_cannot_be_timed_here_has_its_reason() -> None:
    def here() -> Call:
        raise Unavailable("transformers is not installed")

    model = ModelBenchmark(1, 8, torch.float32)
    mix = MixBenchmark(2, 1, 8, 1, 8, torch.float32, "forward")
    run = Run(machine.describe(), "now")
    with patch.object(ModelBenchmark, "makers", lambda _: {"ours": here, "sdpa": here}):
        runner.time_cases(run, [model, mix], runner.Settings(7, 1e-4), on_case=lambda _: None)
    assert [result.name for result in run.results] == [mix.name]
    assert run.left_out == {model.name: "transformers is not installed"}
    assert report.absent(run) == {("ours", "transformers is not installed"): 1}


def test_peers_that_are_not_here_have_their_reason() -> None:
    result = Result(
        "case", "scan", "float32", 1, 1, {"ours": Timing((1.0, 1.0))}, {"fla": "not installed"}
    )
    run = Run(machine.describe(), "now", results=[result, replace(result, name="other")])
    assert report.absent(run) == {("fla", "not installed"): 2}
    console = Console(width=120)
    with console.capture() as captured:
        report.print_run(run, console)
    assert "not installed" in captured.get()


def test_exponent_of_memory() -> None:
    small = MemoryPoint(1024, "float32", 1, 64, 100)
    assert report.exponent(small, MemoryPoint(4096, "float32", 1, 64, 400)) == pytest.approx(1.0)
    assert report.exponent(small, MemoryPoint(2048, "float32", 1, 64, 400)) == pytest.approx(2.0)


def test_a_windows_cost_is_told_beside_its_pairs() -> None:
    name = "attention forward window"
    run = Run(machine.describe(), "now")
    timings = {"ours": Timing((1.0, 1.0)), "ours, no window": Timing((10.0, 10.0))}
    run.results = [Result(name, "window forward", "float32", 1, 1, timings)]
    run.window_shares = {name: 0.08}
    console = Console(width=120)
    with console.capture() as captured:
        console.print(report.window_table(run))
    printed = captured.get()
    for expected in ("8.0%", "10.0%", "1.25"):
        assert expected in printed

"""The timing engine: alternation, medians, the choice of the peer."""

from __future__ import annotations

import multiprocessing
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import pytest
import torch

from resformer_kernels.bench import fresh_pages
from resformer_kernels.bench.fresh_pages import freed_memory_kept
from resformer_kernels.bench.timing import Call, Result, Timing, Unavailable, alternate, measure


def test_contestants_alternate_and_each_starts_in_turn() -> None:
    calls: list[str] = []

    def named(name: str) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            time.sleep(0.002)

        return call

    timings = alternate({"ours": named("a"), "peer": named("b")}, samples=3, min_sample_s=0.001)
    assert calls[:4] == ["a", "a", "b", "b"], "a warm-up and, of a long call, one probe each"
    assert "".join(calls[4:]) == "abbaab"
    assert len(timings["ours"].samples) == 3
    assert timings["ours"].median >= 0.002


def test_short_calls_are_repeated() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    alternate({"ours": call}, samples=2, min_sample_s=0.002)
    assert count > 20


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="samples must be at least 2, got 1"):
        alternate({}, samples=1)


def test_the_peer_is_the_fastest_and_the_ratio_is_of_medians() -> None:
    timings = {
        "ours": Timing((1.0, 2.0, 9.0)),
        "slow": Timing((8.0, 8.0, 8.0)),
        "fast": Timing((1.0, 5.0, 6.0)),
    }
    result = Result("case", "group", "float32", 10, 20, timings)
    assert result.peer == "fast"
    assert result.ratio == 2.5
    assert result.ours.spread == 2.0


@dataclass(frozen=True)
class Sleep:
    name: str = "sleep"
    group: str = "naps"
    dtype: torch.dtype = torch.bfloat16
    flops: int = 7
    bytes: int = 9

    def makers(self) -> Mapping[str, Callable[[], Call]]:
        def missing() -> Call:
            raise Unavailable("not installed")

        return {
            "ours": lambda: lambda: None,
            "peer": lambda: lambda: time.sleep(0.001),
            "slow peer": lambda: lambda: time.sleep(0.002),
            "absent peer": missing,
        }


def test_measure_keeps_the_benchmarks_data() -> None:
    result = measure(Sleep(), samples=2, min_sample_s=0.001)
    assert (result.name, result.group, result.dtype) == ("sleep", "naps", "bfloat16")
    assert (result.flops, result.bytes) == (7, 9)
    assert result.ratio > 1
    # A sleep says at least how long: on a busy machine either may have been the slower one.
    assert set(result.peers) == {"peer", "slow peer"}
    assert result.peers == sorted(result.peers, key=lambda name: result.timings[name].median)
    assert result.absent == {"absent peer": "not installed"}
    assert result.peak_bytes == {}


def test_peers_are_chosen_by_a_part_of_their_name() -> None:
    result = measure(Sleep(), samples=2, min_sample_s=0.001, peers=["SLOW"], peak=lambda _: 7)
    assert result.peers == ["slow peer"]
    assert result.absent == {}
    assert result.peak_bytes == {"ours": 7, "slow peer": 7}
    alone = measure(Sleep(), samples=2, min_sample_s=0.001, peers=["absent"])
    assert alone.peers == []
    with pytest.raises(ValueError, match="no peer took part in sleep"):
        _ = alone.ratio


def test_a_peer_that_fails_is_told_of_and_the_others_are_timed() -> None:
    def broken() -> None:
        raise RuntimeError("\nno compiler\nat all")

    class Broken(Sleep):
        def makers(self) -> Mapping[str, Callable[[], Call]]:
            return {"broken peer": lambda: broken, **super().makers()}

    result = measure(Broken(), samples=2, min_sample_s=0.001)
    assert result.peers == ["peer", "slow peer"]
    assert result.absent["broken peer"] == "failed: RuntimeError: no compiler"

    class BrokenOurs(Sleep):
        def makers(self) -> Mapping[str, Callable[[], Call]]:
            return {**super().makers(), "ours": lambda: broken}

    with pytest.raises(RuntimeError, match="no compiler"):
        measure(BrokenOurs(), samples=2, min_sample_s=0.001)


def test_what_we_cannot_do_ourselves_is_an_error() -> None:
    class Missing(Sleep):
        def makers(self) -> Mapping[str, Callable[[], Call]]:
            return {"ours": super().makers()["absent peer"]}

    with pytest.raises(Unavailable, match="not installed"):
        measure(Missing())


def output(mib: int) -> Callable[[], object]:
    """An output of which about 200 pages are touched: larger than what a heap keeps at its end."""

    def call() -> None:
        torch.empty(mib << 18)[:: mib * 1280].fill_(1)

    return call


def disturbed_samples() -> tuple[list[int], bool, list[int]]:
    """Of 8 samples of each: those with fresh pages as memory is, whether it is kept then, and those
    with fresh pages where it is."""
    blocks = {"ours": output(160), "peer": output(192)}
    fresh = alternate(blocks, samples=8, min_sample_s=0.0)
    with freed_memory_kept() as kept:
        reused = alternate(blocks, samples=8, min_sample_s=0.0, settle_rounds=10)
    return (
        [timing.disturbed for timing in fresh.values()],
        kept,
        [timing.disturbed for timing in reused.values()],
    )


def test_kept_memory_is_reused_and_what_is_not_is_counted() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc can keep freed memory")
    # A new process: what earlier tests freed may lie in one block that is large enough.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        fresh, kept, reused = process.submit(disturbed_samples).result()
    assert fresh == [8, 8]
    assert kept
    # Small allocations of the interpreter may still settle in a free block, once or twice.
    assert all(count < 4 for count in reused)


def test_settling_ends_when_no_fresh_page_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = iter([0, 500, 500, 900, 900, 901, 901, 902] + [902] * 20)
    monkeypatch.setattr(fresh_pages, "touched", lambda: next(pages))
    calls: list[str] = []
    contestants = {"ours": lambda: calls.append("a"), "peer": lambda: calls.append("b")}
    found = alternate(contestants, samples=2, min_sample_s=0.0, settle_rounds=9)
    assert "".join(calls) == "aabb" + "abab" + "abba"
    assert found["ours"].fresh_pages == (0.0, 0.0)

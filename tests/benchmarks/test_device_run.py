"""How `device-check` records the outcomes of its jobs, and its tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import device_jobs, device_report, registry
from benchmarks.device_jobs import Settings
from benchmarks.device_run import DeviceRun
from benchmarks.supervisor import Job, Outcome
from benchmarks.workloads.device import FLEX, SDPA_CUDNN, SDPA_FLASH, DeviceAttention
from resformer_kernels.testing.verification import checks

CASE = "attention forward B4 H16 T4096 D128 causal bfloat16"


def fresh() -> DeviceRun:
    return DeviceRun(Settings("cuda"), 450.0, "now")


def job(kind: str, name: str = CASE) -> Job:
    return Job(kind, name, 60.0)


def done(run: DeviceRun, kind: str, result: dict[str, Any], name: str = CASE) -> None:
    """Tell the run of a job that was done."""
    run.add(Outcome(job(kind, name), result))


def timing(**found: Any) -> dict[str, Any]:
    return {
        "missing": {},
        "errors": {},
        "wrong": {},
        "name": CASE,
        "group": "attention forward",
        "dtype": "bfloat16",
        "flops": 10**12,
        "bytes": 10**9,
        "timings": {"ours": [0.002, 0.004, 0.003], SDPA_CUDNN: [0.002] * 3},
        **found,
    }


def verdict(error: float, budget: float = 1.0) -> dict[str, Any]:
    return {"tensor": "dq", "dtype": "bfloat16", "error": error, "budget": budget, "ok": error <= 1}


def test_a_comparison_over_its_budget_is_a_failure() -> None:
    run = fresh()
    about = {"op": "mix_values", "backend": "triton"}
    done(run, "check", {**about, "verdicts": [verdict(0.5)]})
    assert run.failures == []
    done(run, "check", {**about, "verdicts": [verdict(0.5), verdict(3.0)]}, "bad")
    assert run.failures == [
        {"job": "check bad", "part": "", "reason": "dq 3.00e+00 over its budget of 1.00e+00"}
    ]
    run.add(Outcome(job("check", "crashed"), error="its process died (SIGSEGV)", lost=True))
    assert run.failures[-1]["reason"] == "its process died (SIGSEGV)"


def test_backends_that_serve_nothing_are_listed_and_no_failure() -> None:
    run = fresh()
    for op, backend, served in (("a", "native", False), ("a", "triton", True)):
        about = {"op": op, "backend": backend}
        done(run, "check", {**about, "refused": "it has no sinks"})
        if served:
            done(run, "check", {**about, "verdicts": [verdict(0.5)]})
    assert run.absent() == {"a": {"native": "it has no sinks"}}
    assert run.failures == []


def test_a_part_that_takes_its_process_down_is_left_out() -> None:
    run = fresh()
    following = run.add(Outcome(job("time"), error="died", at="ours", lost=True))
    assert following == Job("time", CASE, 60.0, ("ours",))
    assert run.failures == [{"job": f"time {CASE}", "part": "ours", "reason": "died"}]
    following = run.add(Outcome(following, error="died too", at=FLEX, lost=True))
    assert following is not None
    assert following.without == ("ours", FLEX)
    assert run.missing == {f"{CASE}: {FLEX}": "died too"}
    assert len(run.failures) == 1
    # A part that fails while it is only compiled ahead fails again where it counts.
    following = run.add(Outcome(job("warm"), error="died", at="ours", lost=True))
    assert following is not None
    assert len(run.failures) == 1
    assert run.add(Outcome(job("warm"), error="no start", lost=True)) is None


def test_errors_of_ours_are_failures_and_those_of_peers_are_not() -> None:
    run = fresh()
    done(run, "time", timing(errors={SDPA_CUDNN: "no plan"}, missing={FLEX: "no"}))
    assert run.failures == []
    assert set(run.missing) == {f"{CASE}: {SDPA_CUDNN}", f"{CASE}: {FLEX}"}
    done(run, "time", timing(errors={"ours": "CompilationError"}))
    done(run, "time", timing(missing={"ours": "no kernel serves it"}))
    done(run, "time", timing(wrong={"dq": 0.3}))
    reasons = [failure["reason"] for failure in run.failures]
    assert reasons == ["CompilationError", "relative distance from SDPA: dq 0.300"]
    assert len(run.timings) == 4


def test_what_time_did_not_allow_is_listed_and_no_failure() -> None:
    run = fresh()
    for kind in ("check", "warm", "time"):
        assert run.add(Outcome(job(kind), error="the time was up", unfinished=True)) is None
    assert run.unfinished == [f"check {CASE}", f"time {CASE}"]
    assert run.failures == []


def filled() -> DeviceRun:
    run = fresh()
    ceilings = {
        "machine": {"device": "NVIDIA H200", "torch": "2.11"},
        "slug": "nvidia-h200",
        "gemm_flops_per_s": {"bfloat16": 8e14},
        "bandwidth_bytes_per_s": {"copy": 4e12},
        "readings_before": {"clocks.sm": "345 MHz"},
        "readings_after": {"clocks.sm": "1980 MHz"},
    }
    done(run, "ceilings", ceilings)
    done(run, "time", timing(missing={FLEX: "no"}))
    mix = {"name": "mix_values forward of 2 bfloat16", "group": "mix", "flops": 0}
    samples = {"ours": [0.0005] * 3, "sum of products": [0.001] * 3}
    done(run, "time", timing(**mix, timings=samples))
    only_peer = {"name": CASE.replace("4096", "512"), "timings": {SDPA_FLASH: [0.01] * 3}}
    done(run, "time", timing(**only_peer))
    about = {"op": "mix_values", "backend": "triton"}
    done(run, "check", {**about, "verdicts": [verdict(0.5), verdict(0.25)]})
    refused = {**about, "op": "value_residual_attention", "refused": "it is not built"}
    done(run, "check", refused)
    return run


def test_tables_tell_rates_shares_and_ratios() -> None:
    text = "\n\n".join(sheet.plain() for sheet in device_report.sheets(filled()))
    assert "333  42%" in text, "10^12 FLOP in 3 ms, of 800 TFLOP/s"
    assert "0.67x" in text, "the peer took 2 ms"
    assert "2.00  50%" in text, "10^9 bytes in 0.5 ms, of 4 TB/s"
    assert "triton mix_values bfloat16" in text
    assert "50%" in text
    assert "it is not built" in text
    assert "Failed" not in text
    rows = [line for line in text.splitlines() if line.startswith("B4 H16 T512 D128 causal")]
    assert len(rows) == 1
    assert "100  12%" in rows[0]
    headline = device_report.headline(filled())
    for expected in ("NVIDIA H200", "GEMM bfloat16 800 TFLOP/s", "copy 4.00 TB/s", "1980 MHz"):
        assert expected in headline


def test_failures_are_shown() -> None:
    run = filled()
    done(run, "time", timing(errors={"ours": "CompilationError: why"}))
    (failures,) = [s for s in device_report.sheets(run) if s.title == "Failed"]
    assert failures.rows == ((f"time {CASE}", "ours", "CompilationError: why"),)


@pytest.mark.parametrize("rich", [True, False])
def test_tables_are_printed_with_and_without_rich(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    for sheet in device_report.sheets(filled()):
        device_report.show(sheet)
    printed = capsys.readouterr().out
    assert ("┃" in printed) == rich
    assert "B4 H16 T4096 D128 causal" in printed


def test_a_run_is_stored_whole(tmp_path: Path) -> None:
    path = tmp_path / "results" / "gpu.json"
    filled().store(path)
    stored = json.loads(path.read_text())
    assert [file.name for file in path.parent.iterdir()] == ["gpu.json"]
    assert stored["machine"]["device"] == "NVIDIA H200"
    assert len(stored["timings"]) == 3
    assert stored["absent_backends"] == {"value_residual_attention": {"triton": "it is not built"}}
    assert stored["failures"] == stored["unfinished"] == []


def test_an_empty_run_is_told_too() -> None:
    assert device_report.sheets(fresh()) == []
    assert "none" in device_report.headline(fresh())


def test_the_shapes_that_were_promised_are_there() -> None:
    cases = registry.device_cases("cuda")
    assert len({case.name for case in cases}) == len(cases)
    attention = [case for case in cases if isinstance(case, DeviceAttention)]
    for length in (512, 1024, 2048, 4096, 8192, 16384):
        for dim in (64, 128, 256):
            found = [
                c
                for c in attention
                if (c.length, c.head_dim, c.heads) == (length, dim, 2048 // dim)
            ]
            assert len(found) == 4, "causal and full, forward and backward"
            assert {c.batch * c.length for c in found} == {16384}
    assert [c for c in attention if (c.heads, c.kv_heads, c.head_dim) == (64, 8, 128)]
    first = cases[0]
    assert isinstance(first, DeviceAttention)
    assert (first.length, first.head_dim) == (4096, 128)


def test_checks_have_names_of_their_own_and_jobs_find_them() -> None:
    table = checks(attention=registry.DEVICE_CHECKS)
    assert len({(check.op, check.dtype, check.case) for check in table}) == len(table)
    native, others = device_jobs.check_jobs(Settings("cuda"))
    jobs = [*native, *others]
    assert len({job.name for job in jobs}) == len(jobs)
    assert {job.name.split(":")[0] for job in native} == {"native"}
    assert "flash_attn" in {job.name.split(":")[0] for job in others}
    assert len(native) == len(table)

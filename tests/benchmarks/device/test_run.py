"""How `device-check` records the outcomes of its jobs, its tables, and its plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import registry, tuning
from benchmarks import tuning_space as space
from benchmarks.device import plan, report
from benchmarks.device.cases import CHECK, FAMILIES, LARGE, SMOKE, peer_cases, table
from benchmarks.device.common import Settings
from benchmarks.device.record import DeviceRun, Mismatch, fresh, stored
from benchmarks.supervisor import Job, Outcome
from benchmarks.workloads.device import FLEX, SDPA_CUDNN, SDPA_FLASH, DeviceAttention
from resformer_kernels.testing.verification import checks

CASE = "attention forward B4 H16 T4096 D128 causal bfloat16"


ABOUT = {"device": "NVIDIA H200", "torch": "2.11", "memory bytes": 2**37}


def begun() -> DeviceRun:
    return DeviceRun({"device": "NVIDIA H200"}, dict(ABOUT), "sm90")


def job(kind: str, name: str = CASE, family: str = "triton attention") -> Job:
    return Job(kind, name, 60.0, family=family)


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
    run = begun()
    about = {"op": "mix_values", "backend": "triton", "repeated": 20, "differing": ""}
    done(run, "check", {**about, "verdicts": [verdict(0.5)]})
    assert run.failures == []
    done(run, "check", {**about, "verdicts": [verdict(0.5), verdict(3.0)]}, "bad")
    assert run.failures == [
        {"job": "check bad", "part": "", "reason": "dq 3.00e+00 over its budget of 1.00e+00"}
    ]
    run.add(Outcome(job("check", "crashed"), error="its process died (SIGSEGV)", lost=True))
    assert run.failures[-1]["reason"] == "its process died (SIGSEGV)"


def test_backends_that_serve_nothing_are_listed_and_no_failure() -> None:
    run = begun()
    for op, backend, served in (("a", "native", False), ("a", "triton", True)):
        about = {"op": op, "backend": backend, "repeated": 1, "differing": ""}
        done(run, "check", {**about, "refused": "it has no sinks"})
        if served:
            done(run, "check", {**about, "verdicts": [verdict(0.5)]})
    assert run.absent() == {"a": {"native": "it has no sinks"}}
    assert run.failures == []


def test_a_part_that_takes_its_process_down_is_left_out() -> None:
    run = begun()
    following = run.add(Outcome(job("peers"), error="died", at="ours", lost=True))
    assert following == Job("peers", CASE, 60.0, ("ours",), family="triton attention")
    assert run.failures == [{"job": f"peers {CASE}", "part": "ours", "reason": "died"}]
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
    run = begun()
    done(run, "peers", timing(errors={SDPA_CUDNN: "no plan"}, missing={FLEX: "no"}))
    assert run.failures == []
    assert set(run.missing) == {f"{CASE}: {SDPA_CUDNN}", f"{CASE}: {FLEX}"}
    done(run, "peers", timing(errors={"ours": "CompilationError"}))
    done(run, "peers", timing(missing={"ours": "no kernel serves it"}))
    done(run, "peers", timing(wrong={"dq": 0.3}))
    reasons = [failure["reason"] for failure in run.failures]
    assert reasons == ["CompilationError", "relative distance from SDPA: dq 0.300"]
    assert len(run.timings) == 4


def test_what_time_did_not_allow_is_listed_and_no_failure() -> None:
    run = begun()
    run.planned = [f"{kind} {CASE}" for kind in ("check", "warm", "peers")]
    for kind in ("check", "warm", "peers"):
        assert run.add(Outcome(job(kind), error="the time was up", unfinished=True)) is None
    assert run.unfinished == [f"check {CASE}", f"peers {CASE}"]
    assert run.failures == []


def filled() -> DeviceRun:
    run = begun()
    ceilings = {
        "gemm_flops_per_s": {"bfloat16": 8e14},
        "bandwidth_bytes_per_s": {"copy": 4e12},
        "readings_before": {"clocks.sm": "345 MHz"},
        "readings_after": {"clocks.sm": "1980 MHz"},
    }
    done(run, "ceilings", ceilings)
    done(run, "peers", timing(missing={FLEX: "no"}))
    mix = {"name": "mix_values forward of 2 bfloat16", "group": "mix", "flops": 0}
    samples = {"ours": [0.0005] * 3, "sum of products": [0.001] * 3}
    done(run, "peers", timing(**mix, timings=samples))
    only_peer = {"name": CASE.replace("4096", "512"), "timings": {SDPA_FLASH: [0.01] * 3}}
    done(run, "peers", timing(**only_peer))
    about = {"op": "mix_values", "backend": "triton", "repeated": 20, "differing": ""}
    done(run, "check", {**about, "verdicts": [verdict(0.5), verdict(0.25)]})
    refused = {**about, "op": "value_residual_attention", "refused": "it is not built"}
    done(run, "check", refused)
    return run


def test_tables_tell_rates_shares_and_ratios() -> None:
    text = "\n\n".join(sheet.plain() for sheet in report.sheets(filled()))
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
    headline = report.headline(filled())
    for expected in ("NVIDIA H200", "GEMM bfloat16 800 TFLOP/s", "copy 4 TB/s", "1980 MHz"):
        assert expected in headline


def test_failures_are_shown() -> None:
    run = filled()
    done(run, "peers", timing(errors={"ours": "CompilationError: why"}))
    (failures,) = [s for s in report.sheets(run) if s.title == "Failed"]
    assert failures.rows == ((f"peers {CASE}", "ours", "CompilationError: why"),)


@pytest.mark.parametrize("rich", [True, False])
def test_tables_are_printed_with_and_without_rich(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    for sheet in report.sheets(filled()):
        report.show(sheet)
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
    assert report.sheets(begun()) == []
    assert "none yet" in report.headline(begun())
    assert "not read yet" in report.headline(begun())


def test_other_bits_in_another_run_are_a_failure() -> None:
    run = begun()
    about = {"op": "linear_scan", "backend": "triton", "repeated": 20}
    why = "run 7 of scan on the same inputs differs in 3 of 64 bytes of result 0"
    done(run, "check", {**about, "differing": why, "verdicts": [verdict(0.5)]})
    assert [failure["reason"] for failure in run.failures] == [why]
    text = "\n".join(sheet.plain() for sheet in report.sheets(run))
    assert "1 DIFFER" in text


def test_a_family_that_crashed_or_hung_twice_is_left_out() -> None:
    run = begun()
    first, second, third = (job("check", name) for name in "abc")
    other = job("check", "d", "triton mix")
    run.add(Outcome(first, error="its process died (SIGSEGV)", lost=True))
    assert run.ready(second) == second
    # The device did not survive: a crash, though its process told.
    run.add(Outcome(second, error="illegal memory access", fatal=True))
    assert run.ready(third) is None
    assert run.ready(other) == other
    assert run.left_out == {"check c": "triton attention"}
    (sheet,) = [sheet for sheet in report.sheets(run) if "LEFT OUT" in sheet.title]
    assert sheet.rows[0][0] == "triton attention"
    assert "SIGSEGV" in sheet.rows[0][2]
    assert "1 LEFT OUT" in report.verdict(run)


def test_a_peer_that_crashed_twice_is_left_out_of_other_cases() -> None:
    run = begun()
    for name in "ab":
        run.add(Outcome(job("peers", name), error="died", at=SDPA_CUDNN, lost=True))
    following = run.ready(job("peers", "c"))
    assert following is not None
    assert following.without == (SDPA_CUDNN,)
    assert run.failures == []


def test_what_compiles_ahead_is_not_needed_after_the_timing() -> None:
    run = begun()
    assert run.ready(job("warm")) is not None
    done(run, "peers", timing())
    assert run.ready(job("warm")) is None


def test_the_tables_own_configuration_must_be_right_and_others_need_not() -> None:
    run = begun()
    point = space.Point("forward", "half", 128, "causal")
    own, other, *_ = space.candidates(tuning.load_table(), "sm90", point)
    for trial in (own, other):
        assert space.named(trial.name) == trial
        tried = Job(tuning.TRY, trial.name, 1.0, payload=trial)
        run.add(Outcome(tried, {"wrong": "result 0 is off by 0.700"}))
    assert [failure["job"] for failure in run.failures] == [f"tune try {own.name}"]
    assert list(run.rejected) == [own.name, other.name]


def test_what_was_faster_is_shown_and_becomes_a_table() -> None:
    run = begun()
    assert report.configs(run) == ""
    point = space.Point("forward", "half", 128, "causal")
    own, other, *_ = space.candidates(tuning.load_table(), "sm90", point)
    for trial, seconds in ((own, 2e-3), (other, 1e-3)):
        run.add(Outcome(Job(tuning.TRY, trial.name, 1.0, payload=trial), {"wrong": ""}))
        result = {"wrong": "", "seconds": seconds}
        run.add(Outcome(Job(tuning.TIME, trial.name, 1.0, payload=trial), result))
    written = json.loads(report.configs(run))
    assert written["sm90"]["forward"]["half"]["128"]["causal"] == list(other.config)
    assert any("2.00x" in sheet.plain() for sheet in report.sheets(run))


def test_tools_say_what_they_found() -> None:
    run = begun()
    clean = {"tool": "racecheck", "case": "scan", "code": 0, "found": False, "said": "0 hazards"}
    done(run, "sanitize", clean, "racecheck: scan")
    raced = {**clean, "code": 86, "found": True, "said": "ERROR: Race reported"}
    done(run, "sanitize", raced, "racecheck: reservoir")
    kernel = {"kernel": "forward_kernel", "time": "410.2 us", "SM": "61.0 %"}
    profile = {"tool": "ncu", "case": "a", "code": 0, "found": False, "said": ""}
    done(run, "profile", {**profile, "kernels": [kernel]}, "forward_kernel: a")
    run.add(Outcome(job("sanitize", "memcheck: scan"), error="not done after 80 s", lost=True))
    text = "\n".join(sheet.plain() for sheet in report.sheets(run))
    for expected in ("nothing found", "FOUND SOMETHING", "time 410.2 us", "not done after 80 s"):
        assert expected in text
    assert [failure["reason"] for failure in run.failures] == ["ERROR: Race reported"]


def test_throttling_is_counted() -> None:
    run = filled()
    assert "slowed: none" in report.headline(run)
    done(run, "peers", timing(readings={"clocks.sm": "1200 MHz", "throttled": "power cap"}))
    assert "1 by power cap" in report.headline(run)


def test_a_stored_run_is_gone_on_with_only_by_its_like(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    run = filled()
    run.store(path)
    again = stored(path, run.fingerprint)
    assert again.as_json() == json.loads(path.read_text())
    with pytest.raises(Mismatch, match="device NVIDIA H200, here NVIDIA H100"):
        stored(path, {"device": "NVIDIA H100"})
    path.write_text('{"kind": "device", "format": 1}')
    with pytest.raises(Mismatch, match="format 2"):
        stored(path, {})
    path.write_text("{")
    with pytest.raises(Mismatch, match="cannot be read"):
        stored(path, {})


def test_a_fingerprint_holds_versions_sources_and_settings() -> None:
    found = fresh(Settings("cpu", tiny=True)).fingerprint
    assert {"device", "torch", "python", "sources", "settings"} <= found.keys()
    assert found == fresh(Settings("cpu", tiny=True)).fingerprint
    assert found != fresh(Settings("cpu", tiny=True, repeats=3)).fingerprint


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


@pytest.mark.parametrize("tiny", [True, False])
@pytest.mark.parametrize("kind", [SMOKE, CHECK, LARGE])
def test_checks_have_names_of_their_own_and_jobs_find_them(kind: str, tiny: bool) -> None:
    found = table(kind, "cpu", tiny)
    jobs = plan.comparisons(kind, Settings("cuda", tiny))
    assert len({job.name for job in jobs}) == len(jobs)
    assert {job.name.partition(": ")[2] for job in jobs} == set(found)
    assert "flash_attn" in {job.name.split(":")[0] for job in jobs}
    if not (tiny and kind != SMOKE):
        assert {check.op for check in found.values()} == set(FAMILIES), "every op"


def test_checks_are_the_whole_table() -> None:
    assert len(table(CHECK, "cpu", False)) == len(checks(attention=registry.DEVICE_CHECKS))


def test_phases_stand_in_their_order() -> None:
    phases = plan.phases(Settings("cpu"), {})
    names = [phase.name for phase in phases]
    assert names[:5] == ["smoke test", "checks", "native library", "large shapes", "peers"]
    assert names[-2:] == ["configurations tried", "configurations timed"]
    smoke = [job.family for job in phases[0].jobs([])]
    assert smoke[0].endswith("attention")
    assert smoke[-1].endswith("reservoir")
    assert len(plan.phases(Settings("cpu"), {}, everything=True)) > len(phases)


@pytest.mark.parametrize("tiny", [True, False])
def test_eight_cases_stand_beside_their_peers(tiny: bool) -> None:
    cases = peer_cases("cuda", tiny)
    assert len({case.name for case in cases}) == 8
    groups = {case.group for case in cases}
    assert groups >= {"attention forward", "attention backward", "scan", "mix"}
    assert "decode under CUDA graphs" in groups


def test_few_configurations_of_a_point_are_tried() -> None:
    settings = Settings("cpu")
    point = space.points((128,), ("forward",), ("causal",))[0]
    chosen = [(64, 128, 4, 3), (64, 64, 4, 2)]
    # Lists, as JSON has them.
    found = plan.trials(settings, {point.name: [list(config) for config in chosen]})
    by_point: dict[space.Point, list[space.Config]] = {}
    for trial in found:
        by_point.setdefault(trial.point, []).append(trial.config)
    assert {len(configs) for configs in by_point.values()} <= set(range(1, 9))
    own = space.current(tuning.load_table(), tuning.architecture("cpu"), point)
    assert by_point[point] == list(dict.fromkeys((own, *chosen)))

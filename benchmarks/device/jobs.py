"""The jobs of `resformer-kernels device-check` on a device: comparisons, ceilings, timings.

Everything here runs in a worker of `supervisor`; `plan` makes the lists of jobs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import registry, tuning
from benchmarks.device import tools
from benchmarks.device.cases import CHECK, LARGE, SMOKE, peer_cases, table
from benchmarks.device.common import TOLERANCE, Settings, relative_distance, tensors
from benchmarks.device.plan import CEILINGS, WARM
from benchmarks.device.repeats import Recorded
from benchmarks.device.timer import readings, timer_for
from benchmarks.supervisor import Job
from benchmarks.workloads.device import DEVICE_PEERS, FLEX, DeviceAttention
from resformer_kernels.bench.ceilings import bandwidths, gemm_rates
from resformer_kernels.bench.timing import OURS, Call, Unavailable, about, alternate
from resformer_kernels.testing.verification import verify

_SAMPLE_SECONDS = 0.002
_GEMM_SIZE, _ARRAY_BYTES = 8192, 4 * 2**30
_TINY_GEMM_SIZE, _TINY_ARRAY_BYTES = 64, 2**16


def run(job: Job, settings: Settings, begin: Callable[[str], None]) -> dict[str, Any]:
    """Do a job; `begin` gets the name of each part before it."""
    if job.kind == CEILINGS:
        return _run_ceilings(settings)
    if job.kind in (SMOKE, CHECK, LARGE):
        return _run_check(job, settings)
    if job.kind in (tools.SANITIZE, tools.PROFILE):
        return tools.run(job, settings)
    if job.kind.startswith("tune"):
        return tuning.run_job(job, settings)
    return _run_case(job, settings, begin)


def _run_ceilings(settings: Settings) -> dict[str, Any]:
    timer = timer_for(settings.device)
    size = _TINY_GEMM_SIZE if settings.tiny else _GEMM_SIZE
    array_bytes = _TINY_ARRAY_BYTES if settings.tiny else _ARRAY_BYTES
    where: dict[str, Any] = {"device": settings.device, "timer": timer}
    where["samples"] = settings.samples
    idle = readings()
    gemm = gemm_rates((torch.bfloat16, torch.float16), size=size, **where)
    return {
        "gemm_flops_per_s": gemm,
        "bandwidth_bytes_per_s": bandwidths(array_bytes=array_bytes, **where),
        "readings_before": idle,
        "readings_after": readings(),
    }


def _run_check(job: Job, settings: Settings) -> dict[str, Any]:
    backend, _, name = job.name.partition(": ")
    check = table(job.kind, settings.device, settings.tiny)[name]
    which = {"op": check.op, "backend": backend}
    reason = check.refusal(backend)
    if reason is not None:
        return {**which, "refused": reason}
    with Recorded() as recorded:
        (verdicts,) = verify([check], backend)
    # A first look at each family has to be quick.
    times = 2 if job.kind == SMOKE else settings.repeats
    return {
        **which,
        "verdicts": [{**asdict(v), "ok": v.ok} for v in verdicts],
        "repeated": times if recorded.ops else 1,
        "differing": recorded.differing(times),
    }


def _run_case(job: Job, settings: Settings, begin: Callable[[str], None]) -> dict[str, Any]:
    cases = [
        *peer_cases(settings.device, settings.tiny),
        *registry.device_cases(settings.device, tiny=settings.tiny),
    ]
    case = next(case for case in cases if case.name == job.name)
    calls: dict[str, Call] = {}
    found: dict[str, object] = {}
    missing: dict[str, str] = {}
    errors: dict[str, str] = {}
    for name, make in case.makers().items():
        if name in job.without:
            continue
        begin(name)
        try:
            call = make()
            found[name] = call()
            settings.synchronize()
            calls[name] = call
        except Unavailable as error:
            missing[name] = str(error)
        # Whatever one contestant raises, the others are measured.
        except Exception as error:  # noqa: BLE001
            errors[name] = f"{type(error).__name__}: {error}".strip()[:500]
            # This raises where the device is lost, and ends the worker.
            settings.synchronize()
    wrong = _disagreements(found) if isinstance(case, DeviceAttention) else {}
    found.clear()
    result: dict[str, Any] = {
        "missing": missing,
        "errors": errors,
        "wrong": wrong,
        **about(case),
    }
    if job.kind != WARM and calls:
        begin("")
        timings = alternate(
            calls,
            samples=settings.samples,
            min_sample_s=_SAMPLE_SECONDS,
            timer=timer_for(settings.device),
        )
        result["timings"] = {name: list(timing.samples) for name, timing in timings.items()}
        result["readings"] = readings()
    return result


def _disagreements(found: dict[str, object]) -> dict[str, float]:
    """Our output or gradients that are not the first peer's, with their distance.

    The λ's gradients are cancelling sums, and are left to the comparison with float64.
    """
    peers = [name for name in (*DEVICE_PEERS, FLEX) if name in found]
    if OURS not in found or not peers:
        return {}
    ours, peer = tensors(found[OURS]), tensors(found[peers[0]])
    names = ("out",) if len(ours) == 1 else ("dq", "dk", "dv", "dv_first")
    distances = map(relative_distance, ours, peer)
    # Also where the distance is NaN.
    return {name: off for name, off in zip(names, distances, strict=False) if not off <= TOLERANCE}

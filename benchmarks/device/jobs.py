"""The jobs of `resformer-kernels device-check` on a device: ceilings, comparisons, timings.

Everything here runs in a worker of `supervisor`; the list of jobs is made without the device.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import resformer_kernels
from benchmarks import registry
from benchmarks.device_timer import readings, timer_for
from benchmarks.supervisor import Job
from benchmarks.workloads.device import DEVICE_PEERS, FLEX, DeviceAttention
from resformer_kernels.bench import machine
from resformer_kernels.bench.ceilings import bandwidths, gemm_rates
from resformer_kernels.bench.timing import OURS, Call, Unavailable, about, alternate
from resformer_kernels.testing.verification import Check, checks, verify

TOLERANCE = 0.02
"""The most ‖ours - peer‖ / ‖peer‖ of a bfloat16 output or gradient: several times rounding's."""

_CHECK_SECONDS, _WARM_SECONDS, _TIME_SECONDS, _CEILINGS_SECONDS = 100.0, 150.0, 60.0, 90.0
_SAMPLE_SECONDS = 0.002
_GEMM_SIZE, _ARRAY_BYTES = 8192, 4 * 2**30
_TINY_GEMM_SIZE, _TINY_ARRAY_BYTES = 64, 2**16


@dataclass(frozen=True)
class Settings:
    """Settings that all jobs of a run share."""

    device: str
    tiny: bool = False
    """Small cases, to try out the run itself."""
    samples: int = 7

    def synchronize(self) -> None:
        """Wait for the device, and raise its errors."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize()


def ceilings_job() -> Job:
    """The device's description and its yardsticks."""
    return Job("ceilings", "ceilings", _CEILINGS_SECONDS)


def check_jobs(settings: Settings) -> tuple[list[Job], list[Job]]:
    """Every case of every op, with the native backend and with the others; longest first."""
    jobs = [
        Job("check", f"{backend}: {name}", _CHECK_SECONDS)
        for name, check in reversed(_checks("cpu", settings.tiny).items())
        for backend in backends(check.op)
    ]
    native = [job for job in jobs if job.name.startswith("native: ")]
    return native, [job for job in jobs if job not in native]


def warm_jobs(settings: Settings) -> list[Job]:
    """One case of each kernel that `time` jobs will need, so that they find it compiled."""
    return [
        Job("warm", case.name, _WARM_SECONDS, without=DEVICE_PEERS)
        for case in registry.device_cases(settings.device, tiny=settings.tiny)
        if not isinstance(case, DeviceAttention) or FLEX in case.peers
    ]


def time_jobs(settings: Settings) -> list[Job]:
    """Every case, the most important first."""
    cases = registry.device_cases(settings.device, tiny=settings.tiny)
    return [Job("time", case.name, _TIME_SECONDS) for case in cases]


def backends(op: str) -> list[str]:
    """The backends of an op that are not the reference."""
    api = importlib.import_module(getattr(resformer_kernels, op).__module__)
    return [module.NAME for module in api.BACKENDS if module.NAME != "reference"]


def run(job: Job, settings: Settings, begin: Callable[[str], None]) -> dict[str, Any]:
    """Do a job; `begin` gets the name of each part before it."""
    if job.kind == "ceilings":
        return _run_ceilings(settings)
    if job.kind == "check":
        return _run_check(job, settings)
    return _run_case(job, settings, begin)


def _run_ceilings(settings: Settings) -> dict[str, Any]:
    timer = timer_for(settings.device)
    size = _TINY_GEMM_SIZE if settings.tiny else _GEMM_SIZE
    array_bytes = _TINY_ARRAY_BYTES if settings.tiny else _ARRAY_BYTES
    where: dict[str, Any] = {"device": settings.device, "timer": timer}
    idle = readings()
    gemm = gemm_rates((torch.bfloat16, torch.float16), size=size, **where)
    return {
        "machine": machine.describe_device(settings.device),
        "slug": machine.device_slug(settings.device),
        "gemm_flops_per_s": gemm,
        "bandwidth_bytes_per_s": bandwidths(array_bytes=array_bytes, **where),
        "readings_before": idle,
        "readings_after": readings(),
    }


@functools.cache
def _checks(device: str, tiny: bool) -> dict[str, Check]:
    dtypes = (torch.bfloat16,) if tiny else (torch.bfloat16, torch.float16, torch.float32)
    table = checks(dtypes, device=device, attention=registry.DEVICE_CHECKS)
    if tiny:
        table = [*table[:2], *(check for check in table if check.op.startswith("mix"))]
    return {f"{check.op}, {check.dtype}, {check.case}": check for check in table}


def _run_check(job: Job, settings: Settings) -> dict[str, Any]:
    backend, _, name = job.name.partition(": ")
    check = _checks(settings.device, settings.tiny)[name]
    which = {"op": check.op, "backend": backend}
    reason = check.refusal(backend)
    if reason is not None:
        return {**which, "refused": reason}
    (verdicts,) = verify([check], backend)
    return {**which, "verdicts": [{**asdict(v), "ok": v.ok} for v in verdicts]}


def _run_case(job: Job, settings: Settings, begin: Callable[[str], None]) -> dict[str, Any]:
    cases = registry.device_cases(settings.device, tiny=settings.tiny)
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
    if job.kind == "time" and calls:
        begin("")
        timings = alternate(
            calls,
            samples=settings.samples,
            min_sample_s=_SAMPLE_SECONDS,
            timer=timer_for(settings.device),
        )
        result["timings"] = {name: list(timing.samples) for name, timing in timings.items()}
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


def relative_distance(mine: Tensor, true: Tensor) -> float:
    """‖mine - true‖ / ‖true‖, in float32."""
    true = true.float()
    return float((mine.float() - true).norm() / true.norm())


def tensors(result: object) -> Sequence[Tensor]:
    """The output that a call returned, or the gradients."""
    if isinstance(result, Tensor):
        return (result,)
    assert isinstance(result, tuple)
    return result

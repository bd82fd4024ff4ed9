"""Compare every public op with float64 on a table of cases, on a user's own machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch

from resformer_kernels._core.hardware import MACHINE
from resformer_kernels._core.select import prepare
from resformer_kernels.kvcache.api import attention_with_kvcache
from resformer_kernels.mix import mix_value_embedding, mix_values
from resformer_kernels.reservoir import reservoir_scan
from resformer_kernels.scan import linear_scan
from resformer_kernels.testing.budgets import Comparison, compare_case
from resformer_kernels.testing.inputs import (
    REPRESENTATIVE,
    AttentionCase,
    attention_inputs,
    dtype_name,
)
from resformer_kernels.testing.kvcache import REPRESENTATIVE as KVCACHE
from resformer_kernels.testing.kvcache import KVCacheCase, compare_kvcache, kvcache_inputs
from resformer_kernels.testing.mix_checks import embedding_problem, mix_problem
from resformer_kernels.testing.problems import Arguments, Problem, compare_problem
from resformer_kernels.testing.reservoir_checks import MODES, mode_problem, reservoir_cases
from resformer_kernels.testing.scan_checks import scan_cases

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_SUCH = "has no such backend"
_OFTEN = ("batch", "heads", "kv_heads", "seed", "dtype", "tail", "slack", "coefficient_dtype")


@dataclass(frozen=True)
class Check:
    """One case of the table: `run(backend)` compares every tensor of it."""

    op: str
    case: str
    dtype: str
    function: Callable[..., Any]
    """The public op."""
    arguments: Callable[[], Arguments]
    """Its arguments, made anew at each call; leaves among them want gradients."""
    run: Callable[[str], list[Comparison]]

    def refusal(self, backend: str) -> str | None:
        """Why the backend of this name cannot serve the case, gradients included; None: it can."""
        positional, named = self.arguments()
        request = prepare(self.function, *positional, **named)
        for candidate in request.backends:
            if backend == candidate.NAME:
                reason: str | None = candidate.unsupported_reason(request.call, MACHINE)
                return reason
        return f"{request.op} {_NO_SUCH}"


@dataclass(frozen=True)
class Verdict:
    """One tensor of one case, compared with float64."""

    op: str
    case: str
    dtype: str
    tensor: str
    error: float
    budget: float
    backend: str = "auto"
    """The backend's name, as it was asked for."""
    device: str = "cpu"

    @property
    def ok(self) -> bool:
        """Whether the error is within the budget."""
        return self.error <= self.budget

    @property
    def share(self) -> float:
        """The error as a share of the budget."""
        return share(self.error, self.budget)


def share(error: float, budget: float) -> float:
    """An error as a share of its budget; of a budget of zero: 0 or infinity."""
    if budget > 0:
        return error / budget
    return 0.0 if error == 0 else float("inf")


def checks(
    dtypes: Sequence[torch.dtype] = _DTYPES,
    *,
    device: str = "cpu",
    attention: Sequence[AttentionCase] = REPRESENTATIVE,
) -> list[Check]:
    """The table: attention of every form, over caches too, both mixes and scans in each dtype,
    and reservoirs.

    Args:
        dtypes: cases of other dtypes are left out.
        device: where the kernels and the reference run.
        attention: the cases of attention.
    """
    table = [attention_check(case, device) for case in attention if case.dtype in dtypes]

    for dtype in dtypes:
        for sources in (2, 5):
            problem = partial(mix_problem, sources, dtype, device)
            table.append(problem_check(mix_values, f"{sources} sources", dtype, problem))
        problem = partial(embedding_problem, dtype, device)
        case = "gate by token and head"
        table.append(problem_check(mix_value_embedding, case, dtype, problem))
        for form in reservoir_cases(dtype):
            problem = partial(form.problem, device)
            table.append(problem_check(reservoir_scan, form.name, dtype, problem))
        table += [kvcache_check(replace(case, dtype=dtype), device) for case in KVCACHE]
        for scan in scan_cases(dtype):
            problem = partial(scan.problem, device)
            table.append(problem_check(linear_scan, scan.name, dtype, problem))
    if torch.float32 in dtypes:
        for kind, mode in MODES:
            name = kind if mode == "auto" else f"{kind}, {mode}"
            problem = partial(mode_problem, kind, mode, device)
            table.append(problem_check(reservoir_scan, name, torch.float32, problem))
    return table


def verify(
    table: Sequence[Check], backend: str = "auto", device: str = "cpu"
) -> Iterator[list[Verdict]]:
    """The verdicts of each check in turn; `device` is that of the table."""
    for check in table:
        about = (check.op, check.case, check.dtype)
        yield [
            Verdict(*about, found.name, found.error, found.budget, backend, device)
            for found in check.run(backend)
        ]


def refusals(table: Sequence[Check], backend: str) -> tuple[list[Check], dict[str, int]]:
    """(the checks that a backend can serve; how many it cannot, by reason). A check of an op that
    has no such backend is in neither."""
    served, reasons = [], dict[str, int]()
    for check in table:
        reason = check.refusal(backend)
        if reason is None:
            served.append(check)
        elif not reason.endswith(_NO_SUCH):
            reasons[reason] = reasons.get(reason, 0) + 1
    return served, reasons


def problem_check(
    function: Callable[..., Any], case: str, dtype: torch.dtype, problem: Callable[[], Problem]
) -> Check:
    """The check of `function` on `problem()`, which is made only when it is needed."""

    def arguments() -> Arguments:
        found = problem()
        return found.arguments([x.detach().requires_grad_() for x in found.leaves])

    def run(backend: str) -> list[Comparison]:
        return compare_problem(function, problem(), backend)

    return Check(function.__name__, case, dtype_name(dtype), function, arguments, run)


def attention_check(case: AttentionCase, device: str) -> Check:
    """The check of attention on the inputs that `case` describes."""

    def arguments() -> Arguments:
        inputs = attention_inputs(case, device)
        leaves = {
            name: x.detach().requires_grad_() if x.is_floating_point() else x
            for name, x in inputs.tensors.items()
        }
        return (), {**leaves, **inputs.options}

    def run(backend: str) -> list[Comparison]:
        return compare_case(case, backend=backend, device=device)

    name, dtype = _describe(case), dtype_name(case.dtype)
    return Check(case.function.__name__, name, dtype, case.function, arguments, run)


def kvcache_check(case: KVCacheCase, device: str) -> Check:
    """The check of attention over caches on the inputs that `case` describes."""

    def arguments() -> Arguments:
        inputs = kvcache_inputs(case, device)
        return (), {**inputs.tensors, **inputs.options}

    def run(backend: str) -> list[Comparison]:
        return compare_kvcache(case, backend=backend, device=device)

    name, function = _describe(case), attention_with_kvcache
    return Check(function.__name__, name, dtype_name(case.dtype), function, arguments, run)


def _describe(case: AttentionCase | KVCacheCase) -> str:
    parts = []
    for field in fields(case):
        value = getattr(case, field.name)
        if value == field.default or field.name in _OFTEN:
            continue
        if field.name == "lengths":
            value = f"{len(value)} sequences"
        if field.name == "quantised":
            value = dtype_name(value)
        parts.append(field.name if value is True else f"{field.name}={value}")
    return ", ".join(parts) or "two sources, constants"

"""Hold every public op against float64 on a table of cases: for a user's own machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from resformer_kernels import explain
from resformer_kernels._core.hardware import MACHINE
from resformer_kernels._core.select import prepare
from resformer_kernels.kvcache.api import attention_with_kvcache
from resformer_kernels.mix import mix_value_embedding, mix_values
from resformer_kernels.reservoir import RingWeight, reservoir_scan
from resformer_kernels.scan import linear_scan
from resformer_kernels.testing.budgets import Comparison, compare_case
from resformer_kernels.testing.inputs import REPRESENTATIVE, AttentionCase, attention_inputs
from resformer_kernels.testing.kvcache import (
    REPRESENTATIVE as KVCACHE,
)
from resformer_kernels.testing.kvcache import KVCacheCase, compare_kvcache, kvcache_inputs
from resformer_kernels.testing.poison import poisoned
from resformer_kernels.testing.reservoir_checks import NAMES as RESERVOIR_GRADIENTS
from resformer_kernels.testing.reservoir_checks import ReservoirCase, reservoir_cases
from resformer_kernels.testing.scan_checks import ScanCase, scan_cases

Run = Callable[[str], list[Comparison]]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_SUCH = "has no such backend"
_OFTEN = ("batch", "heads", "kv_heads", "seed", "dtype", "tail", "slack", "coefficient_dtype")


@dataclass(frozen=True)
class Check:
    """One case of the table: `run(backend)` compares every tensor of it."""

    op: str
    case: str
    dtype: str
    serves: Callable[[], str | None]
    """The backend that "auto" takes for this case."""
    refusal: Callable[[str], str | None]
    """Why the backend of this name cannot serve the case, gradients included; None: it can."""
    run: Run


@dataclass(frozen=True)
class Verdict:
    """One tensor of one case, held against float64."""

    op: str
    case: str
    dtype: str
    tensor: str
    error: float
    budget: float
    backend: str = "auto"
    """As it was asked for."""
    device: str = "cpu"

    @property
    def ok(self) -> bool:
        """Whether the error is within the budget."""
        return self.error <= self.budget

    @property
    def share(self) -> float:
        """The error as a share of the budget."""
        if self.budget > 0:
            return self.error / self.budget
        return 0.0 if self.error == 0 else float("inf")


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
        table += [_mix_check(sources, dtype, device) for sources in (2, 5)]
        table.append(_embedding_check(dtype, device))
        table += [_reservoir_form_check(case) for case in reservoir_cases(dtype, device)]
        table += [_kvcache_check(replace(case, dtype=dtype), device) for case in KVCACHE]
        table += [_scan_check(case) for case in scan_cases(dtype, device)]
    if torch.float32 in dtypes:
        table += [_reservoir_check(kind, "auto", device) for kind in ("dense", "groups", "ring")]
        table += [_reservoir_check("dense", mode, device) for mode in ("sequential", "chunked")]
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refusal(backend: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    request = prepare(function, *args, **kwargs)
    for candidate in request.backends:
        if backend == candidate.NAME:
            reason: str | None = candidate.unsupported_reason(request.call, MACHINE)
            return reason
    return f"{request.op} {_NO_SUCH}"


def attention_check(case: AttentionCase, device: str = "cpu") -> Check:
    """The check of one case."""

    def serves() -> str | None:
        inputs = attention_inputs(case, device)
        return explain(inputs.function, **inputs.tensors, **inputs.options).backend

    def refusal(backend: str) -> str | None:
        inputs = attention_inputs(case, device)
        leaves = {
            name: x.detach().requires_grad_() if x.is_floating_point() else x
            for name, x in inputs.tensors.items()
        }
        return _refusal(backend, inputs.function, **leaves, **inputs.options)

    packed = case.lengths is not None
    op = "value_residual_attention_varlen" if packed else "value_residual_attention"
    return Check(
        op,
        _describe(case),
        _name(case.dtype),
        serves,
        refusal,
        lambda backend: compare_case(case, backend=backend, device=device),
    )


def _describe(case: AttentionCase | KVCacheCase) -> str:
    parts = []
    for field in fields(case):
        value = getattr(case, field.name)
        if value == field.default or field.name in _OFTEN:
            continue
        if field.name == "lengths":
            value = f"{len(value)} sequences"
        if field.name == "quantised":
            value = _name(value)
        parts.append(field.name if value is True else f"{field.name}={value}")
    return ", ".join(parts) or "two sources, constants"


def _kvcache_check(case: KVCacheCase, device: str) -> Check:
    def arguments() -> dict[str, Any]:
        inputs = kvcache_inputs(case, device)
        return {**inputs.tensors, **inputs.options}

    return Check(
        "attention_with_kvcache",
        _describe(case),
        _name(case.dtype),
        lambda: explain(attention_with_kvcache, **arguments()).backend,
        lambda backend: _refusal(backend, attention_with_kvcache, **arguments()),
        lambda backend: compare_kvcache(case, backend=backend, device=device),
    )


def _mix_check(sources: int, dtype: torch.dtype, device: str) -> Check:
    generator = torch.Generator().manual_seed(sources)
    shape = (2, 33, 3, 24)
    values = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(sources)]
    forms = [(), (3, 1), (2, 33, 1, 1), (3, 24), (2, 33, 3, 1)][:sources]
    coefficients = [torch.randn(form, generator=generator).to(device) for form in forms]
    grad = torch.randn(shape, generator=generator).to(device, dtype)
    names = [f"dv[{i}]" for i in range(sources)] + [f"dcoefficient[{i}]" for i in range(sources)]

    def mix(leaves: list[Tensor], backend: str) -> Tensor:
        return mix_values(leaves[:sources], leaves[sources:], backend=backend)

    return Check(
        "mix_values",
        f"{sources} sources",
        _name(dtype),
        lambda: explain(mix_values, values, coefficients).backend,
        lambda backend: _refusal(backend, mix_values, values, coefficients),
        lambda backend: _compare(
            mix,
            [*values, *coefficients],
            [x.expand(shape) for x in (*values, *coefficients)],
            grad,
            names,
            backend,
        ),
    )


def _embedding_check(dtype: torch.dtype, device: str) -> Check:
    generator = torch.Generator().manual_seed(0)
    shape = (2, 65, 3, 24)
    v = torch.randn(shape, generator=generator).to(device, dtype)
    table = torch.randn((11, 3, 24), generator=generator).to(device)
    token_ids = torch.randint(11, shape[:2], generator=generator).to(device)
    gate = torch.rand((*shape[:3], 1), generator=generator).to(device)
    grad = torch.randn(shape, generator=generator).to(device, dtype)
    # A table with one row a token has, as its gradient, the terms that the table's sums up.
    every_row = torch.arange(token_ids.numel(), device=device).view(token_ids.shape)

    def mix(leaves: list[Tensor], backend: str) -> Tensor:
        ids = token_ids if leaves[1].shape == table.shape else every_row
        return mix_value_embedding(leaves[0], leaves[1], ids, leaves[2], backend=backend)

    return Check(
        "mix_value_embedding",
        "gate by token and head",
        _name(dtype),
        lambda: explain(mix_value_embedding, v, table, token_ids, gate).backend,
        lambda backend: _refusal(backend, mix_value_embedding, v, table, token_ids, gate),
        lambda backend: _compare(
            mix,
            [v, table, gate],
            [v, table[token_ids].flatten(0, 1), gate.expand(shape)],
            grad,
            ["dv", "dtable", "dgate"],
            backend,
        ),
    )


def _reservoir_check(kind: str, mode: str, device: str) -> Check:
    generator = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    weight = {
        "dense": lambda: normal(48, 48) / 8,
        "groups": lambda: normal(3, 16, 16) / 5,
        "ring": lambda: normal(48) / 2,
    }[kind]()
    leak = (torch.rand(48, generator=generator) * 0.8 + 0.2).to(device)
    leaves = [normal(2, 60, 3), weight, normal(48, 3), leak, normal(48), normal(2, 48)]

    def arguments(x: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given: Any = RingWeight(x[1]) if kind == "ring" else x[1]
        named = {"input_weight": x[2], "leak": x[3], "bias": x[4], "initial_state": x[5]}
        return (x[0], given), {**named, "mode": mode}

    def scan(x: list[Tensor], backend: str) -> Tensor:
        given, named = arguments(x)
        states: Tensor = reservoir_scan(*given, **named, backend=backend)[0]
        return states

    given, named = arguments(leaves)
    return Check(
        "reservoir_scan",
        kind if mode == "auto" else f"{kind}, {mode}",
        "float32",
        lambda: explain(reservoir_scan, *given, **named).backend,
        lambda backend: _refusal(backend, reservoir_scan, *given, **named),
        lambda backend: _compare(
            scan,
            leaves,
            leaves,
            normal(2, 60, 48),
            ["dinputs", "dweight", "dinput_weight", "dleak", "dbias", "dinitial_state"],
            backend,
        ),
    )


def _reservoir_form_check(case: ReservoirCase) -> Check:
    def prepared(use: Callable[..., Any], *first: Any) -> Any:
        given, named = case.call(case.leaves())
        return use(*first, reservoir_scan, *given, **named)

    def compare(backend: str) -> list[Comparison]:
        leaves = case.leaves()
        return _compare(case.scan, leaves, leaves, case.grad(), list(RESERVOIR_GRADIENTS), backend)

    return Check(
        "reservoir_scan",
        case.name,
        _name(case.dtype),
        lambda: prepared(explain).backend,
        lambda backend: prepared(_refusal, backend),
        compare,
    )


def _scan_check(case: ScanCase) -> Check:
    def prepared(use: Callable[..., Any], *first: Any) -> Any:
        leaves, options = case.arguments()
        return use(*first, linear_scan, *leaves, **options)

    return Check(
        "linear_scan",
        case.name,
        _name(torch.float32 if case.dtype.is_complex else case.dtype),
        lambda: prepared(explain).backend,
        lambda backend: prepared(_refusal, backend),
        case.compare,
    )


def _compare(
    mix: Callable[[list[Tensor], str], Tensor],
    leaves: list[Tensor],
    unreduced: list[Tensor],
    grad: Tensor,
    names: list[str],
    backend: str,
) -> list[Comparison]:
    """`unreduced`: the leaves so expanded that no gradient of theirs is a sum."""
    with poisoned():
        got = _outcome(mix, leaves, grad, backend)
    near = _outcome(mix, leaves, grad, "reference")
    exact = _outcome(mix, [x.double() for x in leaves], grad.double(), "reference")
    terms = _outcome(mix, [x.double() for x in unreduced], grad.double(), "reference")
    unit = torch.finfo(grad.dtype).eps / 2
    found = []
    for name, mine, same, true, parts in zip(["out", *names], got, near, exact, terms, strict=True):
        budget = 2 * _distance(same, true) + unit * float(parts.norm())
        found.append(Comparison(name, _distance(mine, true), budget, float(true.norm())))
    return found


def _outcome(
    mix: Callable[[list[Tensor], str], Tensor], leaves: list[Tensor], grad: Tensor, backend: str
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = mix(leaves, backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _distance(got: Tensor, true: Tensor) -> float:
    error = float((got.double() - true).norm())
    return error if error == error else float("inf")

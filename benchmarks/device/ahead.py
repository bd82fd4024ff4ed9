"""The Triton kernels that `device-check` will launch, found and compiled without its device.

Ops run on meta tensors: each launches its kernels into a list instead of onto a device.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import tuning
from benchmarks import tuning_space as space
from benchmarks.device.cases import CHECK, LARGE, SMOKE, Graphed, peer_cases, table
from benchmarks.device.common import Settings
from benchmarks.workloads.device import DeviceAttention
from benchmarks.workloads.mix import MixBenchmark
from benchmarks.workloads.scan import ScanBenchmark
from resformer_kernels import attention_with_kvcache, linear_scan, mix_values
from resformer_kernels import value_residual_attention as attend
from resformer_kernels._core.hardware import Hardware
from resformer_kernels._core.op import OPS, TRITON
from resformer_kernels._core.select import prepare
from resformer_kernels._triton.arch import architecture
from resformer_kernels._triton.cases import CompileCase, case_from_launch
from resformer_kernels._triton.launch import Launch, assumed_capability, recorded_launches
from resformer_kernels.bench.attention import AttentionBenchmark
from resformer_kernels.testing.poison import environment

META = "meta"


class _Supposed(Hardware):
    """A machine on which Triton's kernels run on any tensor."""

    def triton_reason(self, device: torch.device) -> None:
        del device


class _Launching(TorchDispatchMode):
    """Within it the Triton ops run their launchers on meta tensors too."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if func.namespace != TRITON:
            return func(*args, **(kwargs or {}))
        op = OPS[func._opname]
        module, _, name = (op.composed or op.triton or "").partition(":")
        run = getattr(importlib.import_module(module), name)
        return run(*((TRITON,) if op.composed else ()), op.read(args))


@dataclass(frozen=True)
class Problem:
    """A call of an op, on meta tensors; floating ones that require a gradient get one."""

    name: str
    function: Callable[..., Any]
    positional: Sequence[Any]
    named: Mapping[str, Any]


def launches(problem: Problem, capability: tuple[int, int]) -> list[Launch]:
    """What the call and its gradient launch on a device of that capability; nothing where the
    Triton kernels do not serve it."""
    request = prepare(problem.function, *problem.positional, **problem.named)
    backend = next(each for each in request.backends if each.NAME == "triton")
    if backend.unsupported_reason(request.call, _Supposed()) is not None:
        return []
    given = tree_leaves((problem.positional, problem.named))
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    with assumed_capability(capability), recorded_launches() as found, _Launching():
        results = tree_leaves(backend.run(request.call))
        outputs = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
        if outputs:
            grads = [torch.empty_like(x) for x in outputs]
            torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
    return found


def problems(words: str = "") -> Iterator[Problem]:
    """Every comparison with float64 that meta tensors can stand for, and the timed cases; of those
    whose names have all `words`."""

    def named_so(name: str) -> bool:
        return all(word in name for word in words.split())

    for kind in (SMOKE, CHECK, LARGE):
        for name, check in table(kind, META, False).items():
            if not named_so(f"{kind} {name}"):
                continue
            try:
                positional, named = check.arguments()
            except NotImplementedError:
                # Meta tensors know no sparse layout, nor do the Triton kernels.
                continue
            yield Problem(f"{kind} {name}", check.function, positional, named)
    yield from (_timed(case) for case in peer_cases(META, False) if named_so(case.name))


def _timed(case: Any) -> Problem:
    if isinstance(case, DeviceAttention):
        wanted = range(6) if case.direction == "backward" else ()
        return Problem(case.name, attend, _leaves(case, wanted), case.options())
    if isinstance(case, ScanBenchmark):
        return Problem(case.name, linear_scan, case.arguments(), {})
    if isinstance(case, MixBenchmark):
        return Problem(case.name, mix_values, case.arguments(), {})
    assert isinstance(case, Graphed), f"{case.name} is not known here"
    one = case.case
    shape = (one.batch, one.length, one.kv_heads, one.head_dim)
    cache = torch.empty(shape, dtype=one.dtype, device=META)
    q = cache.new_empty(one.batch, 1, one.heads, one.head_dim)
    lengths = torch.empty(one.batch, dtype=torch.int32, device=META)
    tensors = (q, cache, torch.empty_like(cache))
    return Problem(case.name, attention_with_kvcache, tensors, {"cache_seqlens": lengths})


def _leaves(case: AttentionBenchmark, wanted: Sequence[int]) -> list[Tensor]:
    """q, k, v, v_first and both λ; those at the places in `wanted` want a gradient."""
    shape = (case.batch, case.length)
    rows = [
        torch.empty(*shape, heads, case.head_dim, dtype=case.dtype, device=META)
        for heads in (case.heads, *(case.kv_heads,) * 3)
    ]
    leaves = [*rows, *(torch.empty((), device=META) for _ in range(2))]
    return [x.requires_grad_(place in wanted) for place, x in enumerate(leaves)]


def trial_launches(trial: space.Trial, capability: tuple[int, int]) -> list[Launch]:
    """What the tuning pass launches to try a configuration."""
    case = tuning.benchmark(trial.point, Settings(META))
    leaves = _leaves(case, tuning.WANTED[trial.point.direction])
    problem = Problem(trial.name, attend, leaves, case.options())
    with tuning.configured(trial, architecture(capability).name):
        if trial.point.direction != "forward":
            return launches(problem, capability)
        found = []
        for placement in tuning.PLACES:
            with environment(tuning.MIX, placement):
                found += launches(problem, capability)
        return found


def cases(found: Sequence[Launch], capability: tuple[int, int]) -> list[CompileCase]:
    """The launches as the compiler sees them, each kernel once."""
    number = 10 * capability[0] + capability[1]
    unique: dict[str, CompileCase] = {}
    for launch in found:
        case = case_from_launch("", launch, capability=number)
        about = (case.kernel.cache_key, case.signature, case.constants, case.attrs)
        unique.setdefault(repr((*about, case.num_warps, case.num_stages, case.options)), case)
    return list(unique.values())

"""Compile every op's cases in worker processes, which a crash of the compiler may end."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import resformer_kernels
from resformer_kernels._triton import available
from resformer_kernels._triton.arch import label
from resformer_kernels._triton.cases import CompileCase
from resformer_kernels.cli.compile.artifacts import Compiled, build

CASES = "triton.cases"
"""Module of an op's package that lists its cases."""


@dataclass(frozen=True)
class Job:
    """A case as a worker process finds it: the `index`-th of `module` for `capability`."""

    module: str
    capability: int
    index: int
    name: str
    main: bool

    @property
    def op(self) -> str:
        """Op that the module belongs to."""
        return op_of(self.module)


def unavailable_reason() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    if available.interpreted():
        return "TRITON_INTERPRET is set, so kernels are interpreted, not compiled: unset it"
    return available.version_reason()


def case_modules() -> list[str]:
    """Every `triton.cases` of the package, by name."""
    root = Path(resformer_kernels.__file__).parent
    found = sorted(path.parts[-3] for path in root.glob("*/triton/cases.py"))
    return [f"{root.name}.{op}.{CASES}" for op in found]


def op_of(module: str) -> str:
    """The folder of the op that a module of `case_modules` belongs to."""
    return module.split(".")[-3]


def jobs(modules: Sequence[str], capabilities: Sequence[int]) -> list[Job]:
    """Every case of `modules`; ValueError where two cases of one architecture share a name."""
    found = []
    for module in modules:
        for capability in capabilities:
            cases = _cases(module, capability)
            names = [case.name for case in cases]
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise ValueError(
                    f"{module}: {label(capability)} has several cases named {repeated}"
                )
            found += [
                Job(module, capability, index, case.name, case.main)
                for index, case in enumerate(cases)
            ]
    return found


def check(wanted: Sequence[Job], cache: Path, workers: int) -> Iterator[Compiled]:
    """Compile `wanted`, `workers` at a time, and yield in order of completion.

    Compilers do crash: the cases left when a process dies are compiled one after the other, which
    finds the case that crashes, and that one fails.
    """
    left = yield from _attempt(wanted, cache, workers)
    while left:
        left = yield from _attempt(left, cache, 1)
        if left:
            job, *left = left
            problem = "the compiler's process died"
            yield Compiled(job.op, job.name, job.capability, job.main, (problem,))


def _attempt(
    wanted: Sequence[Job], cache: Path, workers: int
) -> Generator[Compiled, None, list[Job]]:
    """Yield what was compiled; return the jobs left when a process died, in order."""
    left = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures: dict[Future[Compiled], Job] = {
            pool.submit(_compile, job, str(cache)): job for job in wanted
        }
        for future in as_completed(futures):
            job = futures[future]
            error = future.exception()
            if error is None:
                yield future.result()
            elif isinstance(error, BrokenProcessPool):
                left.append(job)
            else:
                problem = f"{type(error).__name__}: {error}"
                yield Compiled(job.op, job.name, job.capability, job.main, (problem,))
    return sorted(left, key=wanted.index)


@functools.cache
def _cases(module: str, capability: int) -> tuple[CompileCase, ...]:
    return tuple(importlib.import_module(module).compile_cases(capability))


def _compile(job: Job, cache: str) -> Compiled:
    case = _cases(job.module, job.capability)[job.index]
    return build(job.op, case, job.capability, Path(cache))

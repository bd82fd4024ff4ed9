"""Small calls of ops whose kernels are broken on purpose in `mutants`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from build_support import cuda
from tests.gpu_on_cpu.executor import Fault, Program, Schedule
from tests.gpu_on_cpu.limits import LIMITS

Edit = Callable[[str], str]


@dataclass(frozen=True)
class Pipeline:
    """A pipelined loop, by an instruction that each of its iterations has once."""

    opcode: str
    warps: int
    beyond: int
    """Executions by a warp in other places."""
    stages: int


@dataclass(frozen=True)
class Subject:
    """A call of an op, whose launches the executor runs."""

    name: str
    kernel: str
    """Pattern of the name of the kernel that is broken."""
    capability: int
    call: Callable[[], Any]
    multiprocessors: int | None = None
    """Of the GPU; None: as many as it has."""
    pipeline: Pipeline | None = None

    @property
    def is_true(self) -> bool:
        """Whether its kernels are right as they are."""
        return True

    @property
    def is_here(self) -> bool:
        """Whether its compiler is."""
        return True

    def iterations(self, executed: Counter[str]) -> float:
        """Of the pipelined loop."""
        if self.pipeline is None:
            return 0.0
        return executed[self.pipeline.opcode] / self.pipeline.warps - self.pipeline.beyond

    def run(self, schedule: Schedule, edit: Edit | None = None) -> Counter[str]:
        """Make the call with the kernel changed; returns executed instructions by opcode."""
        from tests.gpu_on_cpu.emulation import emulated

        executed: Counter[str] = Counter()
        given = (self.capability, schedule, edit)
        with torch.no_grad(), emulated(*given, multiprocessors=self.multiprocessors) as emulation:
            self.call()
        for launch in emulation.executed:
            executed.update(launch.report.executed)
        return executed


@dataclass(frozen=True)
class CudaSubject(Subject):
    """The same for an op of the CUDA library."""

    more: int = 0
    """Multiprocessors that the runtime tells of and that are not there."""

    @property
    def is_true(self) -> bool:
        """Whether the runtime is right."""
        return self.more == 0

    @property
    def is_here(self) -> bool:
        """Whether nvcc is."""
        return cuda.find_nvcc() is not None

    def run(self, schedule: Schedule, edit: Edit | None = None) -> Counter[str]:
        """The same, by nvcc's kernels."""
        from resformer_kernels.reservoir import op
        from tests.gpu_on_cpu import cuda_ops

        library = cuda_ops.library("reservoir/reservoir_cuda.cu", op.OPS)
        assert self.multiprocessors is not None
        found = LIMITS[self.capability]._replace(
            multiprocessors=self.multiprocessors, shared_block=3 << 10, shared=4 << 10
        )
        told = found._replace(multiprocessors=self.multiprocessors + self.more)
        library.gpu = cuda_ops.Gpu(self.capability, found, told, schedule)
        if edit is None:
            library.programs.pop(self.capability, None)
        else:
            library.programs[self.capability] = Program(edit(library.ptx(self.capability)))
        self.call()
        executed: Counter[str] = Counter()
        for _, report in library.gpu.reports:
            executed.update(report.executed)
        return executed


def _attention() -> None:
    from resformer_kernels.testing import AttentionCase
    from resformer_kernels.testing.inputs import attention_inputs

    sizes: dict[str, Any] = {"batch": 1, "heads": 1, "kv_heads": 1, "q_len": 100, "k_len": 790}
    dims: dict[str, Any] = {"head_dim": 64, "value_dim": 64, "dtype": torch.bfloat16}
    made = attention_inputs(AttentionCase(**sizes, **dims, causal=True, sources="v"))
    made.function(**made.tensors, **made.options, backend="triton")


def _reservoir(mode: str, **given: Any) -> Callable[[], None]:
    def call() -> None:
        from resformer_kernels import reservoir_scan
        from tests.reservoir import cases

        case = cases.Case("dense", batch=1, mode=mode, **given)
        tensors = cases.problem(case).tensors
        reservoir_scan(**tensors, mode=mode, backend="triton", **case.options)

    return call


def _scan() -> None:
    from resformer_kernels import linear_scan
    from tests.scan import cases

    made = cases.inputs_of(cases.Case(torch.float32, 40, batch=1, length=700))
    linear_scan(*made.leaves, backend="triton")


def _cuda_reservoir() -> None:
    """33 units in parts of the blocks."""
    from resformer_kernels.reservoir.record import ReservoirCall
    from tests.gpu_on_cpu.cuda_ops import NAMESPACE

    draw = torch.Generator().manual_seed(0)
    u, weight = (torch.randn(shape, generator=draw) / 6 for shape in ((2, 4, 33), (33, 33)))
    leak = torch.tensor(0.5)
    call = ReservoirCall(u, weight, None, None, None, leak, None, None, 0, 1, 0.0, None)
    getattr(torch.ops, NAMESPACE).reservoir_scan_forward(*call)


_ALL = (
    # 690 of 790 keys are every query's, in 10 tiles of 64 or 5 of 128. A loop over 3 or 2 more
    # with a mask follows, and each loop waits once more at its end.
    Subject(
        *("attention 80", "forward_kernel", 80, _attention),
        pipeline=Pipeline("cp.async.wait_group", 4, beyond=1 + 3 + 1, stages=3),
    ),
    Subject(
        *("attention 90", "forward_kernel", 90, _attention),
        pipeline=Pipeline("wgmma.wait_group.sync.aligned", 8, beyond=1 + 2 + 1, stages=3),
    ),
    Subject("steps 90", "reservoir", 90, _reservoir("sequential", units=72, steps=4), 6),
    Subject(
        *("chunks 80", "reservoir", 80),
        *(_reservoir("chunked", units=20, steps=70, options={"tolerance": 0.0}), 6),
    ),
    Subject("scan 90", "forward_kernel", 90, _scan),
    Subject("scan 90, one multiprocessor", "forward_kernel", 90, _scan, 1),
    CudaSubject("cuda 90", "recurrence_kernel", 90, _cuda_reservoir, 4),
    CudaSubject("cuda 90, one more", "recurrence_kernel", 90, _cuda_reservoir, 3, more=1),
)
SUBJECTS = {subject.name: subject for subject in _ALL}


@contextmanager
def faults() -> Iterator[list[str]]:
    """Catches a fault, or one that an op of the CUDA library tells of: the list gets its words."""
    found: list[str] = []
    try:
        yield found
    except Fault as fault:
        found.append(str(fault))
    except RuntimeError as error:
        words = re.search(r"launch_cuda\.h:\d+, \w+: ((?:.|\n)*)", str(error))
        if words is None:
            raise
        found.append(words[1])

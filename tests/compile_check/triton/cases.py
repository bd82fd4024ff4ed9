"""The cases of `kernels.py`, in the form that `resformer-kernels compile-check` finds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import NoReturn

import torch

from resformer_kernels._triton.cases import CompileCase, case_from_launch
from resformer_kernels._triton.launch import Launch, recorded_launches
from tests.compile_check.kernels import (
    launch_copy,
    launch_hoard,
    launch_matmul,
    launch_matmul_by_descriptor,
    launch_multiply_transposed,
    launch_overwrite,
    launch_wrong,
)

OVERWRITES = (
    ("overwritten after the load", True, False, False),
    ("overwritten before the load", True, False, True),
    ("overwritten after a barrier", True, True, False),
    ("overwritten before a barrier", True, True, True),
    ("another is overwritten", False, False, False),
)
"""Names, and whether the number is the one that is loaded, a barrier comes between, and the store
comes first."""


def _recorded(launcher: Callable[[], None]) -> Launch:
    with recorded_launches() as launches:
        launcher()
    (launch,) = launches
    return launch


class _Fatal(Mapping[str, int]):
    """Options that end the compiler's process when they are read."""

    def __iter__(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: str) -> int:
        raise KeyError(key)


def compile_cases(capability: int) -> Iterator[CompileCase]:
    """One of each kind of outcome."""

    def case(
        name: str, launcher: Callable[[], None], *, main: bool = False, mma: bool = False
    ) -> CompileCase:
        return case_from_launch(
            name, _recorded(launcher), capability=capability, main=main, expects_mma=mma
        )

    yield case("good", lambda: launch_matmul(64, 64, 64), main=True, mma=True)
    yield case("spills, main", lambda: launch_hoard(32), main=True)
    yield case("spills, not main", lambda: launch_hoard(32))
    yield case("too much shared memory", lambda: launch_matmul(128, 128, 128, num_stages=5))
    # 128 registers of sums leave too few: the assembler gives up overlapping the products.
    yield case("serialised", lambda: launch_matmul(128, 128, 64, maxnreg=152), main=True, mma=True)
    yield case("small tile", lambda: launch_matmul(16, 64, 64), mma=True)
    yield case("float32", lambda: launch_matmul(16, 16, 16, torch.float32), mma=True)
    yield case("refused by Triton", launch_wrong)
    yield case("refused by the assembler", lambda: launch_matmul(64, 128, 32, maxnreg=24))
    yield case("transposed product", launch_multiply_transposed)
    yield case("narrow", lambda: launch_matmul(128, 32, 64, num_warps=4, num_stages=2))
    yield case("narrow, one stage", lambda: launch_matmul(128, 32, 64, num_warps=4, num_stages=1))
    yield case("narrow, eight warps", lambda: launch_matmul(128, 32, 64, num_warps=8))
    yield case("aligned", lambda: launch_copy(torch.empty(4096, device="meta")))
    yield case("unaligned", lambda: launch_copy(torch.empty(4097, device="meta")[1:]))
    for name, same, barrier, early in OVERWRITES:
        yield case(name, partial(launch_overwrite, same=same, barrier=barrier, early=early))
    if capability in (90, 100):
        for stages in (2, 3):
            launcher = partial(launch_matmul_by_descriptor, stages)
            yield case(f"{stages} stages", launcher, mma=True)
    yield replace(case("kills its process", launch_wrong), options=_Fatal())

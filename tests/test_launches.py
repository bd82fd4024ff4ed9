"""What launches compile, what the driver is given, and that no launcher waits for a GPU."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resformer_kernels._core.op import TRITON
from resformer_kernels._triton import available
from tests.op_calls import OpCall, composed_calls, op_calls

pytestmark = pytest.mark.skipif(
    available.version_reason() is not None, reason=str(available.version_reason())
)

MOST_COMPILATIONS = 2
WAITING = ("mix_value_embedding_backward_sparse",)
"""Ops whose results have a size that the data decides."""
CALLS = [*(given for given in op_calls() if given.op.name not in WAITING), *composed_calls()]


def _run(module: str) -> list[str]:
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_no_kernel_is_compiled_for_each_batch_number_of_heads_or_length() -> None:
    found = [line.strip("| ").split(" | ") for line in _run("tests.compilations")]
    assert {op for op, *_ in found} == {"attention", "kvcache", "mix", "scan", "reservoir"}
    assert [row for row in found if int(row[-1]) > MOST_COMPILATIONS] == []


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_driver_is_given_the_same_by_a_replay() -> None:
    lines = _run("tests.driver_launches")
    assert len(lines) == 10
    assert all(int(line.rpartition(": ")[2]) >= 1 for line in lines)


class _Apart(TorchDispatchMode):
    """AssertionError where an op's result lies on another device, or its size is data."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "meta" for x in made), func
        return result


@pytest.mark.parametrize("given", CALLS, ids=lambda given: given.name)
def test_no_launcher_waits_for_the_device(given: OpCall) -> None:
    """As a CUDA graph demands: nothing on the host depends on what a tensor holds."""
    from resformer_kernels._triton.launch import recorded_launches

    call = given.op.read(given.again("meta"))
    module, _, name = (given.op.triton or given.op.composed or "").partition(":")
    first = () if given.op.triton else (TRITON,)
    with recorded_launches() as launches, _Apart():
        getattr(importlib.import_module(module), name)(*first, call)
    assert launches or given.op.triton is None


def test_what_waits_is_noticed() -> None:
    x = torch.zeros(3, device="meta")
    for wait in (x.tolist, x.nonzero, x.cpu, lambda: x[x > 0], x.sum().item):
        with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), _Apart():
            wait()

"""One case's kernels, forward and backward, with nothing else: python -m benchmarks.device.once
SETTINGS KIND NAME, for a checker or a profiler of GPU code."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.device.cases import table
from benchmarks.device.common import Settings
from resformer_kernels.testing.verification import Check


def run(check: Check, backend: str) -> None:
    """The op and, where it has one, its gradient."""
    positional, named = check.arguments()
    found: Any = check.function(*positional, **named, backend=backend)
    outputs = [x for x in tree_leaves(found) if isinstance(x, Tensor) and x.requires_grad]
    if outputs:
        given = tree_leaves((positional, named))
        leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
        grads = [torch.ones_like(x) for x in outputs]
        torch.autograd.grad(outputs, leaves, grads, allow_unused=True)


def main() -> None:
    """Run the case that the command line names with the Triton kernels."""
    settings, kind, name = Settings(**json.loads(sys.argv[1])), *sys.argv[2:]
    run(table(kind, settings.device, settings.tiny)[name], "triton")
    settings.synchronize()


if __name__ == "__main__":
    main()

"""Print a digest of every tensor that the kernels return in `verify`'s cases: diff two runs of it.

    TRITON_INTERPRET=1 python scripts/output_bits.py > before.txt

A line is one output of one op call, or one error against float64: that of the reference's bits.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resformer_kernels.testing.verification import checks, verify

BACKENDS = ("reference", "native", "triton")
NAMESPACES = ("resformer", "resformer_triton")


class Digests(TorchDispatchMode):
    """Prints a digest of each tensor that one of our ops returns or writes."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        if func.namespace in NAMESPACES:
            written = [
                value
                for value, argument in zip(args, func._schema.arguments, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            for tensor in tree_leaves((result, written)):
                if isinstance(tensor, Tensor):
                    print(f"  {func.namespace}::{func._opname} {digest(tensor)}")
        return result


def digest(tensor: Tensor) -> str:
    """Shape, dtype and the first bits of a hash of what a tensor holds."""
    data = (
        tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    )
    return f"{tuple(tensor.shape)} {tensor.dtype} {hashlib.sha256(data).hexdigest()[:16]}"


def main() -> None:
    """Every check on every backend that serves it."""
    for backend in BACKENDS:
        for check in checks():
            if check.refusal(backend) is not None:
                continue
            print(f"{backend} {check.op} {check.case} {check.dtype}")
            with Digests():
                (verdicts,) = verify([check], backend)
            for verdict in verdicts:
                print(f"  {verdict.tensor} {verdict.error.hex()} {verdict.budget.hex()}")


if __name__ == "__main__":
    main()

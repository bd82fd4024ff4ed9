"""Kernels run again on the same inputs: other bits are a race, or memory that nothing wrote."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resformer_kernels._core.op import NATIVE, TRITON
from resformer_kernels.testing.poison import poisoned


class _Ran(NamedTuple):
    """One op as it ran."""

    op: Any
    args: tuple[Any, ...]
    written: list[tuple[Tensor, Tensor]]
    """Arguments that it writes, and what they held before."""
    bits: list[Tensor]
    """Bytes of what it returned and wrote."""


class Recorded(TorchDispatchMode):
    """Within it each op of this package that runs is kept, with its arguments and its bits.

    Other packages' ops are not: some of them add up in any order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[_Ran] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if func.namespace not in (NATIVE, TRITON):
            return func(*args, **(kwargs or {}))
        assert not kwargs, "an op of this package is called with its arguments in order"
        written = [
            (value, value.clone())
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            if isinstance(value, Tensor)
        ]
        result = func(*args)
        self.ops.append(_Ran(func, args, written, _bits(result, written)))
        return result

    def differing(self, times: int) -> str:
        """Run each op until it ran `times` times, its fresh memory NaN: which one gave other bits,
        and when; "" where none did."""
        for ran in self.ops:
            for number in range(2, times + 1):
                for value, before in ran.written:
                    value.copy_(before)
                with poisoned(), torch.no_grad():
                    found = _bits(ran.op(*ran.args), ran.written)
                for place, (first, again) in enumerate(zip(ran.bits, found, strict=True)):
                    if not torch.equal(first, again):
                        off = int((first != again).sum())
                        return (
                            f"run {number} of {ran.op} on the same inputs differs in {off} of "
                            f"{first.numel()} bytes of result {place}"
                        )
        return ""


def _bits(result: object, written: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    every = [*tree_leaves(result), *(value for value, _ in written)]
    return [
        x.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
        for x in every
        if isinstance(x, Tensor)
    ]
